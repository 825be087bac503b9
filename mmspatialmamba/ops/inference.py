"""Layers of the network as one op each, where no gradients are needed: float32, on a CPU with AVX2 or AVX-512.

They are the native backend's. What lies between their steps stays in the processor's caches, so it costs neither memory
nor the time to write it. :func:`fuses_layers` tells whether they can run. None of them has a backward pass.
"""

from __future__ import annotations

import torch

from . import backend


def fuses_layers(x: torch.Tensor) -> bool:
    """Whether the functions of this module can run on an input, and nothing asks for more than their results.

    Gradients do ask for more.

    Args:
        x (Tensor): The input.
    """
    return not torch.is_grad_enabled() and backend.has_products(x)


def norm_linear(x: torch.Tensor, norm: torch.nn.LayerNorm, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear(norm(x), weight)``.

    Args:
        x (Tensor): Input, (..., in), float32.
        norm (nn.LayerNorm): Over the last dimension, with weight and bias.
        weight (Tensor): Weight, (out, in), float32.

    Returns:
        Tensor: (..., out), float32.
    """
    return torch.ops.mmspatialmamba_native.norm_linear(x, norm.weight, norm.bias, norm.eps, weight)


def gated_output(
    y: torch.Tensor,
    x: torch.Tensor,
    norm: torch.nn.LayerNorm,
    gate_weight: torch.Tensor,
    out_norm: torch.nn.LayerNorm,
    weight: torch.Tensor,
) -> torch.Tensor:
    """``x + F.linear(out_norm(y) * silu(F.linear(norm(x), gate_weight)), weight)``, which ends a mixer (figure 3).

    Args:
        y (Tensor): Output of the scan, (..., inner), float32.
        x (Tensor): The mixer's input, (..., dim), float32.
        norm (nn.LayerNorm): That before the mixer, over ``dim``.
        gate_weight (Tensor): Weight of the gate, (inner, dim), float32.
        out_norm (nn.LayerNorm): That after the scan, over ``inner``.
        weight (Tensor): Weight of the output's projection, (dim, inner), float32.

    Returns:
        Tensor: Shape of ``x``, float32.
    """
    return torch.ops.mmspatialmamba_native.gated_output(
        y, x, norm.weight, norm.bias, norm.eps, gate_weight, out_norm.weight, out_norm.bias, out_norm.eps, weight
    )


def norm_mlp(
    x: torch.Tensor,
    norm: torch.nn.LayerNorm,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """``x + F.linear(gelu(F.linear(norm(x), weight1, bias1)), weight2, bias2)``, which ends a block (figure 3).

    Args:
        x (Tensor): Input, (..., dim), float32.
        norm (nn.LayerNorm): That before the MLP, over ``dim``.
        weight1 (Tensor): (hidden, dim), float32.
        bias1 (Tensor): (hidden,), float32.
        weight2 (Tensor): (dim, hidden), float32.
        bias2 (Tensor): (dim,), float32.

    Returns:
        Tensor: Shape of ``x``, float32.
    """
    return torch.ops.mmspatialmamba_native.norm_mlp(x, norm.weight, norm.bias, norm.eps, weight1, bias1, weight2, bias2)


def downsample(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    bias3: torch.Tensor,
) -> torch.Tensor:
    """A pointwise, a depthwise 3x3 and a pointwise convolution, the second of stride 2, with ReLU between them.

    Args:
        x (Tensor): Input, (batch, height, width, in), float32.
        weight1 (Tensor): (hidden, in), float32.
        bias1 (Tensor): (hidden,), float32.
        weight2 (Tensor): (hidden, 1, 3, 3), float32.
        bias2 (Tensor): (hidden,), float32.
        weight3 (Tensor): (out, hidden), float32.
        bias3 (Tensor): (out,), float32.

    Returns:
        Tensor: (batch, ceil(height / 2), ceil(width / 2), out), float32.
    """
    return torch.ops.mmspatialmamba_native.downsample(x, weight1, bias1, weight2, bias2, weight3, bias3)
