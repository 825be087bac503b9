"""Scan, fusion and read-out of a map.

The states pass through main memory once, in float32, from the scan's kernel to that of the fusion; nothing keeps them.
"""

from __future__ import annotations

import torch

from ..selective_scan.triton import bias_gradient, reverse_scan, scan_into
from ..state_fusion.taps import merge_taps, split_taps
from ..state_fusion.triton import fuse, fuse_backward
from ..triton_tiles import new_map


def structure_aware_scan(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    """y, in the dtype and the memory format of ``u``."""
    y = new_map(u)
    size = u.shape[2:]
    h = new_map(u, torch.float32).flatten(2)
    u, delta, B, C = (x.flatten(2) for x in (u, delta, B, C))
    with torch.cuda.device_of(u):
        scan_into(h.unsqueeze(2), u, delta, A, B, delta_bias, delta_softplus)
        fuse(h, size, merge_taps((k1, k3, k5), alpha), y.flatten(2), C, D.contiguous(), u)
    return y


def structure_aware_scan_backward(grad, u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    """The gradients of u, delta, A, B, C, D, k1, k3, k5, alpha and delta_bias."""
    grad_u, grad_delta = new_map(u), new_map(delta)
    size, map_shape = u.shape[2:], B.shape
    kernels = (k1, k3, k5)
    taps = merge_taps(kernels, alpha)
    h, grad_h = (new_map(u, torch.float32).flatten(2) for _ in range(2))
    grad, u, delta, B, C = (x.flatten(2) for x in (grad, u, delta, B, C))
    D = D.contiguous()
    with torch.cuda.device_of(u):
        scan_into(h.unsqueeze(2), u, delta, A, B, delta_bias, delta_softplus)
        grad_C = fuse(h, size, taps, grad_y=grad)
        grad_taps = fuse_backward(grad, h, size, taps, grad_h, C)
        grad_A, grad_B, grad_bias, grad_D = reverse_scan(
            grad_h.unsqueeze(2), h.unsqueeze(2), u, delta, A, B, delta_bias, delta_softplus,
            grad_u.flatten(2), grad_delta.flatten(2), grad, D,
        )  # fmt: skip
    return (
        grad_u,
        grad_delta,
        grad_A.to(A.dtype),
        grad_B.view(map_shape).to(B.dtype),
        grad_C.view(map_shape).to(C.dtype),
        grad_D.to(D.dtype),
        *split_taps(grad_taps, kernels, alpha),
        bias_gradient(grad_bias, delta_bias),
    )
