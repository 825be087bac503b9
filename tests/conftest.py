import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmspatialmamba.compat import TORCH

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / 'data' / 'reference'

# One thread per process: the suite's own processes share the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(scope='session')
def keys() -> dict:
    """Names and shapes of the original release's state dicts."""
    return json.loads((REFERENCE / 'keys.json').read_text())


@pytest.fixture(scope='session')
def goldens() -> dict:
    """What the original release computes, as tensors by name."""
    with np.load(REFERENCE / 'goldens.npz') as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is filled with NaN, so that an element nobody wrote shows; PyTorch can do so since 2.2."""
    torch.use_deterministic_algorithms(True)
    assert TORCH < (2, 2) or torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
