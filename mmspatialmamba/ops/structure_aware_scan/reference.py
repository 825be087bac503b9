"""The structure-aware scan in plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch

from ..library import compute_dtype
from ..selective_scan.reference import linear_recurrence, selective_scan, selective_scan_backward, time_step
from ..state_fusion.reference import state_fusion, state_fusion_backward


def structure_aware_scan(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias)
    x, step, drive_in = (t.to(dtype).permute(0, 2, 3, 1).flatten(1, 2) for t in (u, delta, B))
    dt = time_step(step, delta_bias, delta_softplus)
    decay = torch.exp(dt * A.to(dtype).flatten())
    h = linear_recurrence(decay, dt * drive_in * x)
    h = h.unflatten(1, u.shape[2:]).permute(0, 3, 1, 2)
    g = state_fusion(h, k1, k3, k5, alpha)
    y = C.to(dtype) * g + D.to(dtype).view(-1, 1, 1) * u.to(dtype)
    return y.to(u.dtype)


def structure_aware_scan_backward(grad, u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias)
    grad = grad.to(dtype)
    scan_inputs = (u.flatten(2).to(dtype), delta.flatten(2), A, B.flatten(2), delta_bias, delta_softplus)
    h = selective_scan(*scan_inputs)
    state_map = h.squeeze(2).view_as(u)
    grad_C = (grad * state_fusion(state_map, k1, k3, k5, alpha)).sum(1, keepdim=True)
    grad_D = (grad * u).sum((0, 2, 3))
    grad_map, *grads_fusion = state_fusion_backward(grad * C, state_map, k1, k3, k5, alpha)
    grad_u, grad_delta, grad_A, grad_B, grad_bias = selective_scan_backward(
        grad_map.flatten(2).unsqueeze(2), h, *scan_inputs
    )
    grad_u = grad_u.view_as(u) + D.to(dtype).view(-1, 1, 1) * grad
    return (grad_u, grad_delta.view_as(u), grad_A, grad_B.view_as(B), grad_C, grad_D, *grads_fusion, grad_bias)
