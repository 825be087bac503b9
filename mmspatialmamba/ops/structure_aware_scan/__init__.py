from __future__ import annotations

from collections.abc import Sequence

import torch

from ..library import KERNELS, MAP, check_arguments, register, run
from . import reference


def _fake(u, *others):
    return torch.empty_like(u)


register(
    'structure_aware_scan',
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor k1, Tensor k3, Tensor k5, Tensor alpha, '
    'Tensor? delta_bias, bool delta_softplus',
    reference,
    _fake,
)

_ONE_CHANNEL = ('batch', 1, 'height', 'width')
_SHAPES = {
    'u': MAP,
    'delta': MAP,
    'A': ('dim', 1),
    'B': _ONE_CHANNEL,
    'C': _ONE_CHANNEL,
    'D': ('dim',),
    **KERNELS,
    'alpha': (3,),
    'delta_bias': ('dim',),
}


def structure_aware_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    alpha: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """Selective scan in row-major order, fusion of its states, and read-out (Spatial-Mamba, section 3.2).

    y = C * state_fusion(h) + D * u, with h the states of :func:`selective_scan`, state size 1, over the map's pixels.

    Args:
        u (Tensor): Input, (batch, dim, height, width), any floating dtype, in either memory format.
        delta (Tensor): Time step before bias and softplus, of the shape of ``u``.
        A (Tensor): State matrix's diagonal, (dim, 1), not above 0.
        B (Tensor): Input matrix, (batch, 1, height, width).
        C (Tensor): Output matrix, (batch, 1, height, width).
        D (Tensor): Skip weights, (dim,).
        kernels (Sequence[Tensor]): Fusion kernels of dilation 1, 3 and 5, (dim, 1, 3, 3) each.
        alpha (Tensor): Their weights, (3,).
        delta_bias (Tensor, optional): Added to ``delta``, (dim,). Defaults to None.
        delta_softplus (bool): Whether ``delta`` goes through softplus. Defaults to True.

    Returns:
        Tensor: y, shape and dtype of ``u``. The recurrence, its inputs after softplus and its state are float32, or
        float64 where an input is float64, under every autocast dtype.

    Raises:
        ValueError: If shapes do not fit each other, or the backend asked for cannot run here.
        TypeError: If an input is not a floating point tensor.
    """
    inputs = (u, delta, A, B, C, D, *kernels, alpha, delta_bias)
    check_arguments('structure_aware_scan', _SHAPES, inputs)
    return run('structure_aware_scan', reference, *inputs, delta_softplus)


def structure_aware_scan_backward(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    alpha: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of :func:`structure_aware_scan`, for layers that recompute one of its inputs.

    Args:
        grad (Tensor): Gradient of the output, of the shape of ``u``.
        u, delta, A, B, C, D, kernels, alpha, delta_bias, delta_softplus: The arguments of
            :func:`structure_aware_scan`.

    Returns:
        tuple[Tensor]: Gradients of u, delta, A, B, C, D, the three kernels, alpha and delta_bias, each of the shape and
        dtype of what it belongs to.

    Raises:
        ValueError: If shapes do not fit each other, or the backend asked for cannot run here.
        TypeError: If an input is not a floating point tensor.
    """
    inputs = (u, delta, A, B, C, D, *kernels, alpha, delta_bias)
    check_arguments('structure_aware_scan', {'grad': MAP, **_SHAPES}, (grad, *inputs))
    return run('structure_aware_scan_backward', reference, grad, *inputs, delta_softplus)
