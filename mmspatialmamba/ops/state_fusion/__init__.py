from __future__ import annotations

from collections.abc import Sequence

import torch

from ..library import KERNELS, MAP, check_arguments, compute_dtype, register, run
from . import reference


def _fake(h, k1, k3, k5, alpha):
    return torch.empty_like(h, dtype=compute_dtype(h, k1, k3, k5, alpha))


register('state_fusion', 'Tensor h, Tensor k1, Tensor k3, Tensor k5, Tensor alpha', reference, _fake)

_SHAPES = {'h': MAP, **KERNELS, 'alpha': (3,)}


def state_fusion(h: torch.Tensor, kernels: Sequence[torch.Tensor], alpha: torch.Tensor) -> torch.Tensor:
    """Structure-aware state fusion (Spatial-Mamba, section 3.2).

    The sum over k in {1, 3, 5} of alpha_k times the depthwise 3x3 convolution of dilation k of ``h``, with borders
    padded by replication.

    Args:
        h (Tensor): State map, (batch, dim, height, width), any floating dtype and memory format.
        kernels (Sequence[Tensor]): The three (dim, 1, 3, 3) kernels of dilation 1, 3 and 5.
        alpha (Tensor): Their weights, (3,).

    Returns:
        Tensor: (batch, dim, height, width), float32, or float64 where an input is float64.

    Raises:
        ValueError: If shapes do not fit each other, or the backend asked for cannot run here.
        TypeError: If an input is not a floating point tensor.
    """
    inputs = (h, *kernels, alpha)
    check_arguments('state_fusion', _SHAPES, inputs)
    return run('state_fusion', reference, *inputs)
