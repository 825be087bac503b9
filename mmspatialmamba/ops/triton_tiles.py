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


def offset_type(*tensors: torch.Tensor) -> tl.dtype:
    """The integer type that can hold an offset into any of the tensors."""
    last = max(sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) for t in tensors)
    return tl.int32 if last < INT32_OFFSETS else tl.int64


def pixel_axis(x: torch.Tensor) -> int:
    """Which axis of a tile holds the pixels of ``x``, (batch, dim, pixels)."""
    return 0 if x.stride(1) == 1 and x.stride(2) != 1 else 1


def as_pixels(x: torch.Tensor) -> torch.Tensor:
    """A map (batch, dim, height, width) as (batch, dim, pixels): a view in either memory format, else a copy."""
    return x.flatten(2)


def new_map(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised map with the shape and, if these let its pixels be numbered, the strides of ``like``."""
    out = torch.empty_like(like, dtype=dtype)
    if as_pixels(out).data_ptr() != out.data_ptr():
        out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return out
