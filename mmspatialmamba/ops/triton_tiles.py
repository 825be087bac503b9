"""What the ops' Triton kernels share.

They need the pip package ``triton`` (3.6 or later) and inputs on a CUDA device; no compiler. Where
``TRITON_INTERPRET=1`` is in the environment before ``mmspatialmamba.ops`` is imported, Triton's interpreter runs them
on CPU tensors instead: slowly, for tests. The functions that launch them take plain tensors of checked shapes, return
fresh ones, and know nothing of autograd. They compute in float32.

A tile holds pixels and channels. The one that is contiguous in memory is its last axis, so that neighbouring threads
read neighbouring addresses in both memory formats: ``PIXEL_AXIS`` is 0 for channels-last maps and 1 otherwise. Expanded
along PIXEL_AXIS, a vector of one value a channel is a tile with one pixel; along 1 - PIXEL_AXIS, the other way round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INT32_OFFSETS = 2**31


@triton.jit
def tile_of(pointer, strides, batch, channel, pixel, PIXEL_AXIS: tl.constexpr):
    """Pointers to a tile; ``strides`` are those of batch, channel and pixel."""
    channel = tl.expand_dims(channel * strides[1], PIXEL_AXIS)
    pixel = tl.expand_dims(pixel * strides[2], 1 - PIXEL_AXIS)
    return pointer + batch * strides[0] + (channel + pixel)


@triton.jit
def mask_of(channel_mask, pixel_mask, PIXEL_AXIS: tl.constexpr):
    """Mask of a tile, from those of its channels and its pixels."""
    return tl.expand_dims(channel_mask, PIXEL_AXIS) & tl.expand_dims(pixel_mask, 1 - PIXEL_AXIS)


@triton.jit
def load(pointer, mask):
    """Values as float32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    """Store in the memory's own dtype, rounded to nearest."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), with the relative accuracy of exp also where it is tiny.

    With z = exp(-|x|) and s = z / (2 + z), log(1 + z) = 2 atanh(s); the polynomial in s^2 <= 1/9 is within 1e-8 of
    2 atanh(s) / s.
    """
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    q = s * s
    series = 2.0 + q * (0.66666316 + q * (0.40024854 + q * (0.27961419 + q * 0.28174657)))
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def sigmoid(x):
    z = tl.exp(-tl.abs(x))
    return tl.where(x < 0, z, 1.0) / (1.0 + z)


def power_of_two(size: int, limit: int) -> int:
    """The smallest power of two that holds ``size``, or ``limit``."""
    return min(triton.next_power_of_2(max(size, 1)), limit)


def layout_of(*tensors: torch.Tensor | None) -> tuple[list[tuple[int, ...] | None], tl.dtype]:
    """The strides of each tensor that is there, and the integer type that can hold an offset into any of them."""
    strides = [None if t is None else t.stride() for t in tensors]
    last = max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) for t in tensors if t is not None)
    return strides, tl.int32 if last < INT32_OFFSETS else tl.int64


def pixel_axis(x: torch.Tensor) -> int:
    """Which axis of a tile holds the pixels of ``x``, (batch, dim, pixels)."""
    return 0 if x.stride(1) == 1 and x.stride(2) != 1 else 1


def new_map(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised map with the shape of ``like`` and, if ``flatten(2)`` is a view with these, its strides."""
    out = torch.empty_like(like, dtype=dtype)
    if out.flatten(2).data_ptr() != out.data_ptr():
        out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return out
