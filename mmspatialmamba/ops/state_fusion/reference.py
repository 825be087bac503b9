"""The state fusion in plain PyTorch, differentiable any number of times: three dilated convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..library import compute_dtype

_DILATIONS = (1, 3, 5)


def _split(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k^2 interleaved sub-maps of a map whose height and width are multiples of k, side by side in the batch."""
    submaps = x.permute(0, 2, 3, 1).unflatten(1, (-1, k)).unflatten(3, (-1, k))
    return submaps.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _unite(submaps: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of ``_split``."""
    x = submaps.permute(0, 2, 3, 1).unflatten(0, (-1, k, k)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)


def _pad_and_split(h: torch.Tensor, k: int) -> torch.Tensor:
    """Replicate ``h`` by k pixels a side, and on to a multiple of k, and split it."""
    height, width = h.shape[2:]
    return _split(F.pad(h, (k, k + -width % k, k, k + -height % k), mode='replicate'), k)


def _dilated_depthwise_conv(h: torch.Tensor, kernel: torch.Tensor, dilation: int) -> torch.Tensor:
    """Replicate-padded depthwise 3x3 convolution.

    A dilated convolution is a dense one on each of the dilation^2 interleaved sub-maps. Splitting them off first costs
    two copies and saves much more, since PyTorch's CPU kernels are fast for dense depthwise kernels only.
    """
    fused = _unite(F.conv2d(_pad_and_split(h, dilation), kernel, groups=kernel.shape[0]), dilation)
    return fused[:, :, : h.shape[2], : h.shape[3]]


def _fold(x: torch.Tensor, k: int, dim: int) -> torch.Tensor:
    """Add the outer k rows (or columns) of each side to the one next to them, which they replicate."""
    before, inside, after = x.split([k, x.shape[dim] - 2 * k, k], dim)
    inside = inside.clone()
    inside.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
    inside.narrow(dim, -1, 1).add_(after.sum(dim, keepdim=True))
    return inside


def _dilated_depthwise_conv_backward(grad, h, kernel, dilation):
    k, groups = dilation, kernel.shape[0]
    height, width = h.shape[2:]
    submaps = _pad_and_split(h, k)
    grad = _split(F.pad(grad, (0, -width % k, 0, -height % k)), k)
    padded = _unite(conv2d_input(submaps.shape, kernel, grad, groups=groups), k)
    grad_h = _fold(_fold(padded[:, :, : height + 2 * k, : width + 2 * k], k, 2), k, 3)
    return grad_h, conv2d_weight(submaps, kernel.shape, grad, groups=groups)


def state_fusion(h, k1, k3, k5, alpha):
    dtype = compute_dtype(h, k1, k3, k5, alpha)
    h, k1, k3, k5, alpha = (x.to(dtype) for x in (h, k1, k3, k5, alpha))
    one, three, five = (
        _dilated_depthwise_conv(h, weight * kernel, dilation)
        for kernel, weight, dilation in zip((k1, k3, k5), alpha, _DILATIONS)
    )
    return one + three + five


def state_fusion_backward(grad, h, k1, k3, k5, alpha):
    dtype = compute_dtype(h, k1, k3, k5, alpha)
    grad, h, alpha, *kernels = (x.to(dtype) for x in (grad, h, alpha, k1, k3, k5))
    grads_h, grads_weighted = zip(
        *(
            _dilated_depthwise_conv_backward(grad, h, weight * kernel, dilation)
            for kernel, weight, dilation in zip(kernels, alpha, _DILATIONS)
        )
    )
    grads_kernel = [weight * g for weight, g in zip(alpha, grads_weighted)]
    grad_alpha = torch.stack([(kernel * g).sum() for kernel, g in zip(kernels, grads_weighted)])
    return (sum(grads_h), *grads_kernel, grad_alpha)
