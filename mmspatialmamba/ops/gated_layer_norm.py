from __future__ import annotations

import torch

from . import backend, torch_backend
from .checks import check_shape


def gated_layer_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """LayerNorm over the last dimension, times SiLU of a gate (Spatial-Mamba, figure 3).

    On the CPU the native backend does it in one pass over memory; elsewhere, and with the other backends, it is
    PyTorch's LayerNorm and SiLU.

    Args:
        x (Tensor): Input, (..., dim).
        gate (Tensor): Gate before SiLU, shape of ``x``.
        weight (Tensor): Weight of the LayerNorm, (dim,).
        bias (Tensor): Bias of the LayerNorm, (dim,).
        eps (float): Added to the variance. Defaults to 1e-5.

    Returns:
        Tensor: Shape of ``x``, and its dtype or under autocast PyTorch's choice.

    Raises:
        ValueError: If shapes do not fit each other.
        TypeError: If an input is not a floating point tensor.
    """
    op = 'gated_layer_norm'
    check_shape(op, 'x', x, tuple(x.shape))
    check_shape(op, 'gate', gate, tuple(x.shape))
    check_shape(op, 'weight', weight, tuple(x.shape[-1:]))
    check_shape(op, 'bias', bias, tuple(x.shape[-1:]))
    if backend.fuses_elementwise(x, gate, weight, bias):
        return torch.ops.mmspatialmamba_native.gated_layer_norm(x, gate, weight, bias, eps)
    return torch_backend.gated_layer_norm(x, gate, weight, bias, eps)
