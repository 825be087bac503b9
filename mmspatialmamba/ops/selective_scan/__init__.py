from __future__ import annotations

import torch

from ..library import check_arguments, compute_dtype, register, run
from . import reference


def _fake(u, delta, A, B, delta_bias, delta_softplus):
    return u.new_empty((u.shape[0], *A.shape, u.shape[2]), dtype=compute_dtype(u, delta, A, B, delta_bias))


register(
    'selective_scan',
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, bool delta_softplus',
    reference,
    _fake,
    keeps_output=True,
)

_SEQUENCE = ('batch', 'dim', 'length')
_SHAPES = {
    'u': _SEQUENCE,
    'delta': _SEQUENCE,
    'A': ('dim', 'state'),
    'B': ('batch', 'state', 'length'),
    'delta_bias': ('dim',),
}


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """State sequence of the selective state-space recurrence (Spatial-Mamba, section 3.1).

    h_t = exp(dt_t * A) * h_(t-1) + dt_t * B_t * u_t, from h = 0, with dt = delta + delta_bias, through softplus if
    asked for. The parallel form that computes it is stable for A <= 0.

    Args:
        u (Tensor): Input, (batch, dim, length), any floating dtype.
        delta (Tensor): Time step before bias and softplus, (batch, dim, length).
        A (Tensor): State matrix's diagonal, (dim, state), not above 0.
        B (Tensor): Input matrix, (batch, state, length).
        delta_bias (Tensor, optional): Added to ``delta``, (dim,). Defaults to None.
        delta_softplus (bool): Whether ``delta`` goes through softplus. Defaults to False.

    Returns:
        Tensor: h, (batch, dim, state, length), float32, or float64 where an input is float64, under every autocast
        dtype.

    Raises:
        ValueError: If shapes do not fit each other, or the backend asked for cannot run here.
        TypeError: If an input is not a floating point tensor.
    """
    check_arguments('selective_scan', _SHAPES, (u, delta, A, B, delta_bias))
    return run('selective_scan', reference, u, delta, A, B, delta_bias, delta_softplus)
