"""What the tests that start the tools in processes of their own share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def cpu_environment(**env: object) -> dict[str, str]:
    """The environment of a process that sees no GPU, has one thread and is of no process group, and ``env``."""
    kept = {k: v for k, v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    kept.update(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PYTHON=sys.executable)
    return {**kept, **{key: str(value) for key, value in env.items()}}


def write_images(folder: Path, classes: Sequence[int]) -> None:
    """Write an image of noise for each of the ``classes``, in a sub-folder for each class."""
    generator = np.random.default_rng(0)
    for index, number in enumerate(classes):
        path = folder / f'class{number}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
