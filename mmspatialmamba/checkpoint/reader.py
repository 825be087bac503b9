"""Reading of checkpoints that unpickles nothing but tensors and the allow-list of ``safe_globals.py``."""

from __future__ import annotations

import http.client
import os
import re
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner.checkpoint import CheckpointLoader

from mmspatialmamba.registry import SCOPE

from .convert import find_backbones, to_mmengine
from .errors import CheckpointError
from .safe_globals import load_weights_only

EMA = 'ema://'
# How torch.load names what it refuses to run.
_REFUSED = re.compile(r'(?:GLOBAL|unrecognized function|[Cc]an only (?:create|build).*but got) (<.*>|\S+)')


def _one_line(error: object) -> str:
    """Select the line of an error's message that says what is wrong."""
    text = str(error).split('WeightsUnpickler error: ')[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _load_file(path: Path, map_location: object, source: str) -> dict:
    """Read a local file; errors call it ``source``."""
    if path.is_dir():
        raise CheckpointError(f'{source} is a directory: name a checkpoint file in it')
    if not path.is_file():
        raise CheckpointError(f'there is no checkpoint {source} (working directory: {Path.cwd()})')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{source} is empty: get it again')
    safetensors = path.suffix == '.safetensors'
    if safetensors and find_spec('safetensors') is None:
        raise CheckpointError(f'{source} needs safetensors, which is not installed: pip install safetensors')
    try:
        if safetensors:
            from safetensors.torch import load_file

            device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
            checkpoint = load_file(path, device=str(device))
        else:
            checkpoint = load_weights_only(path, map_location)
    except OSError as error:
        raise CheckpointError(f'cannot read {source}: {error.strerror or error}') from error
    except Exception as error:  # Of any class: the file decides what goes wrong.
        if refused := _REFUSED.search(str(error)):
            raise CheckpointError(
                f'{source} is refused: loading it would run {refused[1]}, which is no part of weights; '
                'get weights from someone you trust'
            ) from error
        kind = 'safetensors file' if safetensors else 'PyTorch checkpoint'
        raise CheckpointError(f'{source} is cut short or not a {kind} ({_one_line(error)}): get it again') from error
    if not isinstance(checkpoint, dict) or not _has_tensor(checkpoint):
        content = 'a dict without tensors' if isinstance(checkpoint, dict) else f'a {type(checkpoint).__name__}'
        raise CheckpointError(f'{source} holds {content}, no weights: name a file that holds a dict of tensors')
    return checkpoint


def _has_tensor(value: object, depth: int = 4) -> bool:
    """Say whether a value is a tensor or holds one, ``depth`` dicts deep: a hostile dict may hold itself."""
    if isinstance(value, dict) and depth > 0:
        return any(_has_tensor(item, depth - 1) for item in value.values())
    return isinstance(value, torch.Tensor)


def _download(url: str, map_location: object, source: str) -> dict:
    """Read a URL through torch.hub's cache, which keeps no file that cannot be read."""
    cached = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(url).path) or 'index')
    if cached.exists():
        return _load_file(cached, map_location, f'{source} (cached as {cached}, delete that to download it again)')
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), progress=sys.stderr.isatty())
        return _load_file(cached, map_location, source)
    except CheckpointError:
        cached.unlink()
        raise
    except urllib.error.HTTPError as error:
        raise CheckpointError(f'cannot download {source}: HTTP {error.code} ({error.reason}): check the URL') from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f'cannot download {source}: {_one_line(getattr(error, "reason", None) or error)}: '
            'check the URL and the network, or download it yourself and name the file'
        ) from error


def fetch(filename: str, map_location: object, source: str) -> dict:
    """Read a local file or a URL as it is, or raise ``CheckpointError``. Of several processes the first downloads."""
    if not filename.startswith(('http://', 'https://')):
        return _load_file(Path(filename).expanduser(), map_location, source)
    if get_rank() == 0:
        try:
            return _download(filename, map_location, source)
        finally:
            barrier()
    barrier()
    return _download(filename, map_location, source)


def first_nonfinite(state: dict) -> str | None:
    """Find the first tensor of a state dict that holds NaN or infinity; None if none does."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def _sign(checkpoint: dict, source: str, renamed: bool) -> dict:
    """Put a note into the metadata of a checkpoint's state dict, which torch hands to every module that loads it.

    It names the file, and says whether its weights had other names or another form.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        return checkpoint
    metadata = getattr(state, '_metadata', None)
    entries = metadata.items() if isinstance(metadata, dict) else ()
    # A plain dict has no room for metadata.
    state = OrderedDict(state)
    state._metadata = OrderedDict((prefix, dict(entry)) for prefix, entry in entries if isinstance(entry, dict))
    pop_note(state)
    note = {'file': source, 'renamed': renamed}
    for prefix in {'', 'backbone', *(prefix[:-1] for prefix in find_backbones(state))}:
        state._metadata.setdefault(prefix, {})[SCOPE] = note
    return {**checkpoint, 'state_dict': state} if 'state_dict' in checkpoint else state


def pop_note(state: dict) -> dict:
    """Remove the note of :func:`read_checkpoint` from a state dict's metadata, and return it; {} if there is none."""
    notes = [entry.pop(SCOPE, None) for entry in getattr(state, '_metadata', {}).values()]
    return next(filter(None, notes), {})


def read_checkpoint(filename: str, map_location: str | torch.device | dict | Callable | None = None) -> dict:
    """Read a checkpoint from a file or URL, unpickling nothing but tensors and a short allow-list.

    A checkpoint with a Spatial-Mamba backbone is returned in mmengine's form and with our names, whichever of the
    published forms it has. Of any other, dicts alone may become ``OrderedDict``.

    Args:
        filename (str): A local path or an http(s) URL, of a PyTorch file or (by its suffix) a ``.safetensors`` file.
            'ema://' before it selects the averaged weights: the original release's ``model_ema`` instead of ``model``.
        map_location (str | torch.device | dict | Callable, optional): As in :func:`torch.load`. Defaults to None.

    Returns:
        dict: The checkpoint.

    Raises:
        CheckpointError: If the file is not there, cut short, no checkpoint, or holds anything that is no part of
            weights or of mmengine's training state; or if 'ema://' is given and it holds no average.
    """
    source = str(filename)
    average = source.startswith(EMA)
    checkpoint = fetch(source[len(EMA) :] if average else source, map_location, source)
    converted = to_mmengine(checkpoint, source, average)
    if converted is not None:
        return _sign(converted, source, renamed=converted is not checkpoint)
    if average:
        raise CheckpointError(
            f'{source}: ema:// is for checkpoints of Spatial-Mamba, and this holds none: leave it out'
        )
    return _sign(checkpoint, source, renamed=False)


@CheckpointLoader.register_scheme(prefixes=EMA)
def load_from_mmspatialmamba(filename: str, map_location: object = None) -> dict:
    """Read a checkpoint for mmengine, which logs this function's name; see :func:`read_checkpoint`."""
    return read_checkpoint(filename, map_location)


def register_checkpoint_loaders(*prefixes: str) -> None:
    """Let mmengine read through :func:`read_checkpoint` what its own loaders read otherwise.

    Args:
        *prefixes (str): Regular expressions for the beginnings of the names of files and URLs. Defaults to all local
            files and http(s) URLs, of whichever model, in the whole process.
    """
    prefixes = prefixes or ('', 'http://', 'https://')
    CheckpointLoader.register_scheme(prefixes, load_from_mmspatialmamba, force=True)
