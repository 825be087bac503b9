from __future__ import annotations

import torch

from . import backend, torch_backend
from .checks import check_shape

_FINISHES = ('none', 'silu', 'residual')


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, finish: str = 'none') -> torch.Tensor:
    """Depthwise 3x3 convolution of stride 1, zero-padded, and what follows it in a block (Spatial-Mamba, figure 3).

    On the CPU the native backend does it in one pass over memory, whatever the strides of ``x``; elsewhere, and with
    the other backends, it is PyTorch's convolution, in float32 on a CPU that has no instructions for its dtype.

    Args:
        x (Tensor): Input, (batch, dim, height, width), in either memory format.
        weight (Tensor): Kernels, (dim, 1, 3, 3).
        bias (Tensor): Bias, (dim,).
        finish (str): 'none'; 'silu', which applies SiLU; or 'residual', which adds ``x``. Defaults to 'none'.

    Returns:
        Tensor: Shape of ``x``, and its dtype or under autocast that of autocast's convolutions.

    Raises:
        ValueError: If shapes do not fit each other, or ``finish`` is not one of the three.
        TypeError: If an input is not a floating point tensor.
    """
    op = 'depthwise_conv'
    check_shape(op, 'x', x, (None, None, None, None))
    dim = x.shape[1]
    check_shape(op, 'weight', weight, (dim, 1, 3, 3))
    check_shape(op, 'bias', bias, (dim,))
    if finish not in _FINISHES:
        raise ValueError(f'{op}: finish must be one of {", ".join(map(repr, _FINISHES))}, but is {finish!r}')
    if backend.fuses_elementwise(x, weight, bias):
        return torch.ops.mmspatialmamba_native.depthwise_conv(x, weight, bias, finish)
    return torch_backend.depthwise_conv(x, weight, bias, finish)


def fuses_downsampling(x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Whether :func:`downsampling_conv` can run: on the CPU, in float32, with a multiple of 16 channels."""
    return x.shape[1] % 16 == 0 and backend.has_products(x, *parameters)


def downsampling_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """ReLU, depthwise 3x3 convolution of stride 2 and ReLU, the middle of a downsampling layer, on the native backend.

    The first ReLU's output and the gradients between the three are not written to memory. :func:`fuses_downsampling`
    tells where it can run.

    Args:
        x (Tensor): Input, (batch, dim, height, width), float32, best in the channels-last memory format.
        weight (Tensor): Kernels, (dim, 1, 3, 3).
        bias (Tensor): Bias, (dim,).

    Returns:
        Tensor: (batch, dim, ceil(height / 2), ceil(width / 2)), in the channels-last memory format.
    """
    return torch.ops.mmspatialmamba_native.downsampling_conv(x, weight, bias)
