from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import dispatch
from ..library import check_arguments, register
from . import reference


def _fake(x, gate, weight, bias, eps):
    return x.new_empty(x.shape)


def _gradients_fake(x, gate, weight, bias):
    return x.new_empty(x.shape), gate.new_empty(gate.shape), torch.empty_like(weight), torch.empty_like(bias)


register(
    'gated_layer_norm',
    'Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps',
    reference,
    _fake,
    _gradients_fake,
    backends=('native',),
)


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
    shape = tuple(x.shape)
    shapes = {'x': shape, 'gate': shape, 'weight': shape[-1:], 'bias': shape[-1:]}
    check_arguments('gated_layer_norm', shapes, (x, gate, weight, bias))
    if x.is_cpu and dispatch.choose(x, gate, weight, bias) == 'native':
        return torch.ops.mmspatialmamba_native.gated_layer_norm(x, gate, weight, bias, eps)
    return F.layer_norm(x, shape[-1:], weight, bias, eps) * F.silu(gate)
