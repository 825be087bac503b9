"""Publish a training checkpoint: write its weights alone, to a file with a part of its SHA-256 in its name."""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

from upstream_to_mmspatialmamba import write

from mmspatialmamba.checkpoint import CheckpointError, read_checkpoint, to_mmengine
from mmspatialmamba.checkpoint.reader import first_nonfinite


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('in_file', help='checkpoint to read: a file or URL')
    parser.add_argument('out_file', type=Path, help='NAME.pth or NAME.safetensors, for the file NAME-SHA256[:8].pth')
    parser.add_argument(
        '--no-ema', action='store_true', help='take the weights themselves, where EMAHook has saved their average'
    )
    return parser.parse_args()


def publish(in_file: str, ema: bool = True) -> dict:
    """Read a checkpoint and keep its weights.

    Args:
        in_file (str): File or URL.
        ema (bool): Whether to take the average, where ``EMAHook`` has saved one. Defaults to True.

    Returns:
        dict: The checkpoint to write: 'state_dict', by our names, and in 'meta' the names of the data set's classes.

    Raises:
        CheckpointError: If the file cannot be read, or holds no weights of Spatial-Mamba, or such that are not finite.
    """
    checkpoint = read_checkpoint(in_file, 'cpu')
    if not ema and 'ema_state_dict' in checkpoint:
        weights = {name: value for name, value in checkpoint['ema_state_dict'].items() if name != 'steps'}
        checkpoint['state_dict'] = weights
    checkpoint = to_mmengine(checkpoint, in_file)
    if checkpoint is None:
        raise CheckpointError(f'{in_file} holds no weights of Spatial-Mamba: name another file')
    nonfinite = first_nonfinite(checkpoint['state_dict'])
    if nonfinite is not None:
        raise CheckpointError(f'{in_file}: {nonfinite} holds NaN or infinity: use an earlier checkpoint')
    state = OrderedDict((name, value.detach().clone()) for name, value in checkpoint['state_dict'].items())
    meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key == 'dataset_meta'}
    return {'state_dict': state, 'meta': meta}


def main() -> int:
    args = parse_args()
    try:
        digest, path = write(publish(args.in_file, not args.no_ema), args.out_file, digest_in_name=True)
    except CheckpointError as error:
        print(f'{Path(__file__).name}: {error}', file=sys.stderr)
        return 2
    print(f'{digest}  {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
