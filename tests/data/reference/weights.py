"""Weights and images rebuilt from names and seeds, so that no file has to carry them."""

import zlib

import numpy as np
import torch


def make(name: str, shape: tuple, seed: int = 0) -> torch.Tensor:
    """The value of the upstream parameter or buffer ``name`` (its whole dotted name) of ``shape``."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'num_batches_tracked':
        return torch.tensor(1, dtype=torch.long)
    value = rng.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    if leaf == 'running_var':
        value = 1 + 0.2 * np.abs(value)
    elif leaf == 'running_mean':
        value = 0.1 * value
    elif leaf == 'A_logs':
        value = 0.3 * value
    elif leaf == 'Ds':
        value = 1 + 0.1 * value
    elif leaf == 'dt_projs_bias':
        value = -4 + value
    elif leaf in ('kernel_3', 'kernel_3_1', 'kernel_3_2'):
        value = 0.2 * value + 0.1
    elif leaf == 'alpha':
        value = 1 + 0.2 * value
    elif len(shape) == 1:
        value = 1 + 0.1 * value if leaf == 'weight' else 0.1 * value
    else:
        value = value / np.sqrt(int(np.prod(shape[1:])))
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))


def state_dict(keys: list, seed: int = 0) -> dict:
    """A whole upstream state dict; ``keys`` is one list of keys.json."""
    return {name: make(name, tuple(shape), seed) for name, shape in keys}


def image(shape: tuple, seed: int) -> torch.Tensor:
    """Standard-normal values, float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
