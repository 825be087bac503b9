from __future__ import annotations

import torch

from . import backend, torch_backend
from .checks import check_shape


def biased_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact, not its tanh approximation) of the input and a bias, as in a block's MLP (Spatial-Mamba, figure 3).

    On the CPU the native backend does it in one pass over memory. Elsewhere, and with the other backends, it takes
    PyTorch two: there, let the linear layer before it add the bias.

    Args:
        x (Tensor): Input, (..., dim).
        bias (Tensor): Bias, (dim,).

    Returns:
        Tensor: Shape of ``x``, and its dtype or PyTorch's promotion of both dtypes.

    Raises:
        ValueError: If shapes do not fit each other.
        TypeError: If an input is not a floating point tensor.
    """
    op = 'biased_gelu'
    check_shape(op, 'x', x, tuple(x.shape))
    check_shape(op, 'bias', bias, tuple(x.shape[-1:]))
    if backend.fuses_elementwise(x, bias):
        return torch.ops.mmspatialmamba_native.biased_gelu(x, bias)
    return torch_backend.biased_gelu(x, bias)
