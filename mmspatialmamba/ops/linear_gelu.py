from __future__ import annotations

import torch
import torch.nn.functional as F

from . import backend
from .checks import check_shape


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Linear layer, then GELU (exact, not its tanh approximation), as in a block's MLP (Spatial-Mamba, figure 3).

    On the CPU the native backend adds the bias and applies GELU in one pass over the matrix product; elsewhere, and
    with the other backends, these are PyTorch's.

    Args:
        x (Tensor): Input, (..., in_features).
        weight (Tensor): Weight, (out_features, in_features).
        bias (Tensor): Bias, (out_features,).

    Returns:
        Tensor: (..., out_features), of the dtype of ``x``, or under autocast that of autocast's linear layers.

    Raises:
        ValueError: If shapes do not fit each other.
        TypeError: If an input is not a floating point tensor.
    """
    op = 'linear_gelu'
    check_shape(op, 'x', x, tuple(x.shape))
    check_shape(op, 'weight', weight, (None, x.shape[-1]))
    check_shape(op, 'bias', bias, (weight.shape[0],))
    if backend.fuses_elementwise(x, weight, bias):
        return torch.ops.mmspatialmamba_native.biased_gelu(F.linear(x, weight), bias)
    return F.gelu(F.linear(x, weight, bias))
