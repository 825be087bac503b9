from __future__ import annotations

import torch

from .. import dispatch
from ..library import MAP, check_arguments, register
from . import reference

register(
    'depthwise_conv',
    'Tensor x, Tensor weight, Tensor bias, str finish',
    reference,
    lambda x, weight, bias, finish: torch.empty_like(x),
    backends=('native',),
)

_FINISHES = ('none', 'silu', 'residual')
_SHAPES = {'x': MAP, 'weight': ('dim', 1, 3, 3), 'bias': ('dim',)}


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, finish: str = 'none') -> torch.Tensor:
    """Depthwise 3x3 convolution of stride 1, zero-padded, and what follows it in a block (Spatial-Mamba, figure 3).

    On the CPU the native backend does it in one pass over memory, whatever the strides of ``x``. Elsewhere, and with
    the other backends, it is PyTorch's convolution. On the CPU every backend computes in float32, or in float64 where
    an input is float64, and rounds once.

    Args:
        x (Tensor): Input, (batch, dim, height, width), in either memory format.
        weight (Tensor): Kernels, (dim, 1, 3, 3).
        bias (Tensor): Bias, (dim,).
        finish (str): 'none'; 'silu', which applies SiLU; or 'residual', which adds ``x``. Defaults to 'none'.

    Returns:
        Tensor: Shape of ``x``, and its dtype; on other devices than the CPU under autocast that of autocast's
        convolutions.

    Raises:
        ValueError: If shapes do not fit each other, or ``finish`` is not one of the three.
        TypeError: If an input is not a floating point tensor.
    """
    check_arguments('depthwise_conv', _SHAPES, (x, weight, bias))
    if finish not in _FINISHES:
        raise ValueError(f'depthwise_conv: finish must be one of {", ".join(map(repr, _FINISHES))}, but is {finish!r}')
    if x.is_cpu and dispatch.choose(x, weight, bias) == 'native':
        return torch.ops.mmspatialmamba_native.depthwise_conv(x, weight, bias, finish)
    return reference.depthwise_conv(x, weight, bias, finish)
