"""Convert checkpoints of the original Spatial-Mamba release to this package's names, and back."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch

from mmspatialmamba.checkpoint.audit import describe_arch
from mmspatialmamba.checkpoint.convert import below, find_backbones, find_state, is_classifier, last_stage, new_names
from mmspatialmamba.checkpoint.errors import CheckpointError
from mmspatialmamba.checkpoint.reader import fetch, first_nonfinite
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.utils import is_upstream, to_upstream

PREFIX = 'backbone.'
SEGMENTATION_PARTS = {'decode_head', 'auxiliary_head', 'neck'}
CLASSIFIER_HEAD = ('head.fc.weight', 'head.fc.bias')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='checkpoint to read: a file or URL, .safetensors or else a PyTorch file')
    parser.add_argument('dst', type=Path, help='file to write, .pth or .safetensors')
    parser.add_argument('--ema', action='store_true', help='take the averaged weights (model_ema)')
    parser.add_argument(
        '--task',
        choices=('cls', 'det', 'seg'),
        help='what the checkpoint is of, which is checked: a classifier, a detector or a segmentor; '
        'default: what it looks like',
    )
    parser.add_argument(
        '--reverse', action='store_true', help="read this package's names, write the original release's"
    )
    return parser.parse_args()


def find_task(names: list[str]) -> str:
    """Which task the model with these names (ours) is for: 'cls', 'det' or 'seg'."""
    if is_classifier(names, PREFIX):
        return 'cls'
    return 'seg' if any(name.startswith('decode_head.') for name in names) else 'det'


def wrong_key(state: dict, task: str) -> str | None:
    """Find the first tensor, by our names, that a model for ``task`` doesn't have, or lacks, or has in another shape.

    Args:
        state (dict): Parameters and buffers by our names.
        task (str): 'cls', 'det' or 'seg'.

    Returns:
        str | None: The name of the first wrong tensor; None if all is as it should be.
    """
    arch = describe_arch(state, PREFIX)
    if arch is None:
        return f'{PREFIX}stem.conv3.1.norm.weight'
    last = last_stage(below(state, PREFIX))
    norms = [i for i in range(last + 1) if f'{PREFIX}norm{i}.weight' in state]
    stem = state.get(f'{PREFIX}stem.conv1.conv.weight')
    if stem is None or stem.ndim != 4:
        return f'{PREFIX}stem.conv1.conv.weight'
    with torch.device('meta'):
        model = SpatialMamba(arch, stem.shape[1], last if task == 'cls' or not norms else norms)
    wanted = {PREFIX + name: value.shape for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.startswith(PREFIX):
            wrong = wanted.get(name) != value.shape
        elif task == 'cls':
            wrong = name not in CLASSIFIER_HEAD
        elif task == 'seg':
            wrong = name.split('.')[0] not in SEGMENTATION_PARTS
        else:
            wrong = name.split('.')[0] in ('head', 'decode_head', 'auxiliary_head')
        if wrong:
            return name
    wanted_heads = CLASSIFIER_HEAD if task == 'cls' else ('decode_head.conv_seg.weight',) if task == 'seg' else ()
    needed = [name for name in wanted if not name.endswith('num_batches_tracked')]
    return next((name for name in (*needed, *wanted_heads) if name not in state), None)


def upstream_name(name: str, task: str, last: int) -> str:
    """The original release's name for one of ours, in a whole model's state dict.

    Args:
        name (str): Our name.
        task (str): 'cls', 'det' or 'seg'.
        last (int): Index of the backbone's last stage.

    Returns:
        str: The original release's name.
    """
    if not name.startswith(PREFIX):
        return name.replace('head.fc.', 'head.') if task == 'cls' else name
    if task == 'cls':
        return to_upstream(name[len(PREFIX) :], last)
    return PREFIX + to_upstream(name[len(PREFIX) :])


def convert(src: str, ema: bool = False, task: str | None = None, reverse: bool = False) -> dict:
    """Read a checkpoint and give it the other names.

    Args:
        src (str): File or URL.
        ema (bool): Whether to take the averaged weights. Defaults to False.
        task (str, optional): 'cls', 'det' or 'seg'. Defaults to None: what the checkpoint looks like.
        reverse (bool): Whether the checkpoint has our names, and gets the original release's. Defaults to False.

    Returns:
        dict: The checkpoint to write: nothing but tensors, below 'state_dict' or, for a classifier of the original
        release, 'model'.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is not what it is said to be.
    """
    found = find_state(fetch(src, 'cpu', src), src, ema)
    if found is None:
        raise CheckpointError(f'{src} holds no weights of Spatial-Mamba: name another file')
    old = found[1]
    names = new_names(old)
    state = OrderedDict((names[name], value) for name, value in old.items())
    old_names = {new: name for name, new in names.items()}
    prefixes = find_backbones(state)
    if prefixes != [PREFIX]:
        raise CheckpointError(f'{src}: there must be one backbone, below {PREFIX!r}, but they are below {prefixes}')
    upstream = next((name for name in old if is_upstream([name.split(PREFIX)[-1]])), None)
    if reverse == (upstream is not None):
        ours = 'already ours: use --reverse, or publish_model.py'
        advice = "the original release's: leave out --reverse" if reverse else ours
        raise CheckpointError(f'{src}: the name {upstream or next(iter(old))} is {advice}')
    looks = find_task(list(state))
    task = task or looks
    wrong, last = wrong_key(state, task), last_stage(below(state, PREFIX))
    if wrong is not None:
        shape = f'has shape {tuple(state[wrong].shape)}' if wrong in state else 'is missing'
        raise CheckpointError(
            f'{src} is not the checkpoint of a Spatial-Mamba model for task {task}: its first wrong key is '
            f'{old_names.get(wrong) or (wrong if reverse else upstream_name(wrong, task, last))}, which {shape}'
        )
    nonfinite = first_nonfinite(state)
    if nonfinite is not None:
        raise CheckpointError(f'{src}: {old_names[nonfinite]} holds NaN or infinity: use an earlier checkpoint')
    state = OrderedDict((name, value.detach().clone()) for name, value in state.items())
    if not reverse:
        return {'state_dict': state, 'meta': {}}
    renamed = OrderedDict((upstream_name(name, task, last), value) for name, value in state.items())
    return {'model' if task == 'cls' else 'state_dict': renamed}


def write(checkpoint: dict, dst: Path, digest_in_name: bool = False) -> tuple[str, Path]:
    """Write a checkpoint in one step: the file is there whole, or as it was before.

    Args:
        checkpoint (dict): What :func:`convert` returns.
        dst (Path): A .pth or .safetensors file.
        digest_in_name (bool): Whether to name it NAME-DIGEST.pth, with 8 digits of its SHA-256. Defaults to False.

    Returns:
        tuple[str, Path]: The file's SHA-256, and the file.

    Raises:
        CheckpointError: If the suffix is another one, or the file cannot be written.
    """
    if dst.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{dst}: DST must end in .pth or .safetensors')
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dst.parent) as folder:
            path = Path(folder, dst.name)
            if dst.suffix == '.safetensors':
                save_safetensors(next(iter(checkpoint.values())), path)
            else:
                # Through memory, because torch.save writes a path's name into the file.
                content = io.BytesIO()
                torch.save(checkpoint, content)
                path.write_bytes(content.getvalue())
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest_in_name:
                dst = dst.with_stem(f'{dst.stem}-{digest[:8]}')
            os.replace(path, dst)
    except OSError as error:
        raise CheckpointError(f'cannot write {dst}: {error.strerror or error}') from error
    return digest, dst


def save_safetensors(state: dict, path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError(
            f'{path.name} needs safetensors, which is not installed: pip install safetensors'
        ) from error
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={'format': 'pt'})


def main() -> int:
    args = parse_args()
    try:
        checkpoint = convert(args.src, args.ema, args.task, args.reverse)
        digest, _ = write(checkpoint, args.dst)
    except CheckpointError as error:
        print(f'{Path(__file__).name}: {error}', file=sys.stderr)
        return 2
    print(f'{digest}  {args.dst}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
