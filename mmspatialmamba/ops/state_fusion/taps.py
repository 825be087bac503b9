"""The fusion's three dilated kernels as one of 25 taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_OFFSETS = [(k * row, k * column) for k in (1, 3, 5) for row in (-1, 0, 1) for column in (-1, 0, 1)]

# (row, column) in pixels: the nine of dilation 1, then the eight outer ones of dilation 3, then of 5. The three kernels
# share their centre. csrc/common/taps.h has the same table.
TAPS = tuple(dict.fromkeys(_OFFSETS))

# Which tap each of the kernels' 27 elements belongs to, and which elements each tap sums.
_TAP_OF_ELEMENT = [TAPS.index(offset) for offset in _OFFSETS]
_ELEMENTS_OF_TAP = [[i for i, offset in enumerate(_OFFSETS) if offset == tap] for tap in TAPS]


def _elements(kernels: Sequence[torch.Tensor]) -> torch.Tensor:
    """The kernels' elements, (3, 9, dim) in float32."""
    return torch.stack([kernel.float().flatten(1) for kernel in kernels]).transpose(1, 2)


def merge_taps(kernels: Sequence[torch.Tensor], alpha: torch.Tensor) -> torch.Tensor:
    """Merge the three (dim, 1, 3, 3) kernels, weighted by ``alpha``, into the 25 taps, (25, dim) in float32."""
    weighted = (_elements(kernels) * alpha.float().view(3, 1, 1)).flatten(0, 1).unbind()
    taps = []
    for first, *others in _ELEMENTS_OF_TAP:
        tap = weighted[first]
        for other in others:
            tap = tap + weighted[other]
        taps.append(tap)
    return torch.stack(taps)


def split_taps(grad: torch.Tensor, kernels: Sequence[torch.Tensor], alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split the gradient of the taps, (25, dim), into those of the three kernels and of alpha, in their dtypes."""
    taps = grad.unbind()
    parts = torch.stack([taps[tap] for tap in _TAP_OF_ELEMENT]).view(3, 9, -1)
    grad_alpha = (_elements(kernels) * parts).sum((1, 2)).to(alpha.dtype)
    grads = (alpha.float().view(3, 1, 1) * parts).transpose(1, 2)
    return *(g.reshape(k.shape).to(k.dtype) for g, k in zip(grads, kernels)), grad_alpha
