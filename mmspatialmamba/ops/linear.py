from __future__ import annotations

import torch
import torch.nn.functional as F

from . import backend


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, with the native backend's products for float32 on a CPU with AVX2 or AVX-512.

    These are as fast as PyTorch's for many channels, and faster for few. Elsewhere, for other dtypes, under autocast,
    export and tracing they are PyTorch's.

    Args:
        x (Tensor): Input, (..., in).
        weight (Tensor): Weight, (out, in).
        bias (Tensor, optional): Bias, (out,). Defaults to None.

    Returns:
        Tensor: (..., out).
    """
    if backend.has_products(x, weight, bias):
        return torch.ops.mmspatialmamba_native.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def gelu_linear(x: torch.Tensor, gelu_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``F.linear(F.gelu(x + gelu_bias), weight, bias)``, the second half of a block's MLP, on the native backend.

    The forward pass does not write the GELU to memory; the backward pass computes it again together with its gradient.
    :func:`.backend.has_products` tells where it can run.

    Args:
        x (Tensor): Input, (..., in), float32.
        gelu_bias (Tensor): Bias, (in,), float32.
        weight (Tensor): Weight, (out, in), float32.
        bias (Tensor): Bias, (out,), float32.

    Returns:
        Tensor: (..., out), float32.
    """
    return torch.ops.mmspatialmamba_native.gelu_linear(x, gelu_bias, weight, bias)


def linear_weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad.t() @ x``, the gradient of a linear layer's weight, by the same products as :func:`linear`.

    Args:
        grad (Tensor): Gradient of the layer's output, (rows, out).
        x (Tensor): The layer's input, (rows, in).

    Returns:
        Tensor: (out, in).
    """
    if backend.has_products(grad, x):
        return torch.ops.mmspatialmamba_native.linear_weight_gradient(grad, x)
    return grad.t() @ x
