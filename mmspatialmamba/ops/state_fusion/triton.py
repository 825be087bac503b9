"""The fusion of a state map with its neighbours, 25 taps of three dilated kernels, on replicated borders."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_tiles import layout_of, load, mask_of, new_map, pixel_axis, power_of_two, store, tile_of
from .taps import TAPS, merge_taps, split_taps

_TAPS = tl.constexpr(TAPS)
_TAP_COUNT = tl.constexpr(len(TAPS))


@triton.jit
def _place(
    blocks, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr
):
    """Which tile a program has: batch, block of channels, tile, channels, and rows, columns and mask of its pixels."""
    program = tl.program_id(0).to(OFFSET)
    tiles_across = (width + COLUMNS - 1) // COLUMNS
    tiles = (height + ROWS - 1) // ROWS * tiles_across
    tile = program % tiles
    block = program // tiles % blocks
    batch = program // tiles // blocks
    place = tl.arange(0, ROWS * COLUMNS)
    row = tile // tiles_across * ROWS + place // COLUMNS
    column = tile % tiles_across * COLUMNS + place % COLUMNS
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    return batch, block, batch * tiles + tile, channel, row, column, (row < height) & (column < width)


@triton.jit
def _fusion_kernel(
    h, taps, C, D, u, grad_y, out, h_strides, C_strides, u_strides, grad_y_strides, out_strides,
    dim, height, width, blocks,
    OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """With g the fused states, write g, or C g + D u if ``C`` is given, or sums over channels if ``grad_y`` is."""
    batch, block, _, channel, row, column, pixel_mask = _place(blocks, height, width, ROWS, COLUMNS, CHANNELS, OFFSET)
    pixel = row * width + column
    mask = mask_of(channel < dim, pixel_mask, PIXEL_AXIS)
    fused = tl.full(mask.shape, 0.0, tl.float32)
    states = h + batch * h_strides[0] + tl.expand_dims(channel * h_strides[1], PIXEL_AXIS)
    for tap in tl.static_range(_TAP_COUNT):
        near_row = tl.minimum(tl.maximum(row + _TAPS[tap][0], 0), height - 1)
        near_column = tl.minimum(tl.maximum(column + _TAPS[tap][1], 0), width - 1)
        near = tl.expand_dims((near_row * width + near_column) * h_strides[2], 1 - PIXEL_AXIS)
        weight = load(taps + tap * dim + channel, channel < dim)
        fused += tl.expand_dims(weight, PIXEL_AXIS) * load(states + near, mask)
    if grad_y is not None:
        grad = load(tile_of(grad_y, grad_y_strides, batch, channel, pixel, PIXEL_AXIS), mask)
        part = tl.sum(grad * fused, 1 - PIXEL_AXIS)
        tl.store(out + (batch * blocks + block) * height * width + pixel, part, mask=pixel_mask)
    else:
        if C is not None:
            value = load(tile_of(u, u_strides, batch, channel, pixel, PIXEL_AXIS), mask)
            read = load(C + batch * C_strides[0] + pixel * C_strides[2], pixel_mask)
            skip = load(D + channel, channel < dim)
            fused = tl.expand_dims(read, 1 - PIXEL_AXIS) * fused + tl.expand_dims(skip, PIXEL_AXIS) * value
        store(tile_of(out, out_strides, batch, channel, pixel, PIXEL_AXIS), fused, mask)


@triton.jit
def _folded_range(place, size):
    """The first and last of the places that count as ``place`` of the folded axis."""
    beyond = place - size
    reach = 2 * (beyond % 3) + 1
    first = tl.where(beyond < 0, place, tl.where(beyond < 3, 0, tl.maximum(size - 1 - reach, 0)))
    last = tl.where(beyond < 0, place, tl.where(beyond < 3, tl.minimum(reach, size - 1), size - 1))
    return first, last


@triton.jit
def _fold_kernel(
    grad, C, out, grad_strides, C_strides, out_strides, dim, height, width, blocks,
    OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``grad``, times C if given, with six rows and six columns more.

    Through the replicated border an edge pixel is read by its neighbours up to 1, 3 or 5 pixels away, so the added rows
    are the sums of the first 2, 4 and 6 rows, and of the last 2, 4 and 6; likewise the columns. Every tap of the
    transposed fusion then reads one pixel.
    """
    place = _place(blocks, height + 6, width + 6, ROWS, COLUMNS, CHANNELS, OFFSET)
    batch, _, _, channel, row, column, pixel_mask = place
    mask = mask_of(channel < dim, pixel_mask, PIXEL_AXIS)
    total = tl.full(mask.shape, 0.0, tl.float32)
    first_row, last_row = _folded_range(row, height)
    first_column, last_column = _folded_range(column, width)
    grads = grad + batch * grad_strides[0] + tl.expand_dims(channel * grad_strides[1], PIXEL_AXIS)
    for i in range(tl.max(tl.where(pixel_mask, last_row - first_row, 0), 0) + 1):
        for j in range(tl.max(tl.where(pixel_mask, last_column - first_column, 0), 0) + 1):
            pixel = (first_row + i) * width + first_column + j
            near_mask = pixel_mask & (first_row + i <= last_row) & (first_column + j <= last_column)
            near = tl.expand_dims(pixel * grad_strides[2], 1 - PIXEL_AXIS)
            value = load(grads + near, mask_of(channel < dim, near_mask, PIXEL_AXIS))
            if C is not None:
                read = load(C + batch * C_strides[0] + pixel * C_strides[2], near_mask)
                value *= tl.expand_dims(read, 1 - PIXEL_AXIS)
            total += value
    store(tile_of(out, out_strides, batch, channel, row * (width + 6) + column, PIXEL_AXIS), total, mask)


@triton.jit
def _unfold(place, size, OFFSET_BY: tl.constexpr):
    """Where the folded axis has what ``place`` passes to the tap at OFFSET_BY, and whether there is such a thing."""
    source = place - OFFSET_BY
    inside = (source >= 0) & (source < size)
    if OFFSET_BY < 0:
        source = tl.where(place == 0, size + (-OFFSET_BY - 1) // 2, source)
        inside = inside | (place == 0)
    if OFFSET_BY > 0:
        source = tl.where(place == size - 1, size + 3 + (OFFSET_BY - 1) // 2, source)
        inside = inside | (place == size - 1)
    return source, inside


@triton.jit
def _fusion_backward_kernel(
    folded, h, taps, grad_h, grad_taps, folded_strides, h_strides, grad_h_strides,
    dim, height, width, blocks,
    OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The transposed fusion, and the sums over the program's pixels that make the gradients of the 25 taps."""
    batch, _, tile, channel, row, column, pixel_mask = _place(blocks, height, width, ROWS, COLUMNS, CHANNELS, OFFSET)
    pixel = row * width + column
    mask = mask_of(channel < dim, pixel_mask, PIXEL_AXIS)
    state = load(tile_of(h, h_strides, batch, channel, pixel, PIXEL_AXIS), mask)
    total = tl.full(mask.shape, 0.0, tl.float32)
    sources = folded + batch * folded_strides[0] + tl.expand_dims(channel * folded_strides[1], PIXEL_AXIS)
    for tap in tl.static_range(_TAP_COUNT):
        source_row, row_inside = _unfold(row, height, _TAPS[tap][0])
        source_column, column_inside = _unfold(column, width, _TAPS[tap][1])
        inside = mask_of(channel < dim, pixel_mask & row_inside & column_inside, PIXEL_AXIS)
        source = (source_row * (width + 6) + source_column) * folded_strides[2]
        grad = load(sources + tl.expand_dims(source, 1 - PIXEL_AXIS), inside)
        weight = load(taps + tap * dim + channel, channel < dim)
        total += tl.expand_dims(weight, PIXEL_AXIS) * grad
        part = tl.sum(grad * state, PIXEL_AXIS)
        tl.store(grad_taps + (tile * _TAP_COUNT + tap) * dim + channel, part, mask=channel < dim)
    store(tile_of(grad_h, grad_h_strides, batch, channel, pixel, PIXEL_AXIS), total, mask)


def _tiling(x, height, width, rows):
    """The number of programs, and the sizes and constants all kernels take, for ``x``, (batch, dim, pixels).

    ``rows`` is the most rows of a tile; a thread's share of it is that many times two numbers.
    """
    batch, dim, _ = x.shape
    axis = pixel_axis(x)
    columns, channels = (8, 32) if axis == 0 else (32, 8)
    rows, columns, channels = power_of_two(height, rows), power_of_two(width, columns), power_of_two(dim, channels)
    blocks = triton.cdiv(dim, channels)
    tiles = batch * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    constants = dict(PIXEL_AXIS=axis, ROWS=rows, COLUMNS=columns, CHANNELS=channels, num_warps=4)
    return tiles, blocks, constants


def fuse(h, size, taps, out=None, C=None, D=None, u=None, grad_y=None):
    """Fuse the states ``h`` of a map of this ``size`` (height, width); every map is (batch, dim, pixels).

    Writes the fused states g into ``out``, or C g + D u if these are given. With ``grad_y`` it writes nothing, and
    returns the sums over channels of grad_y g, (batch, pixels) in float32.
    """
    tiles, blocks, constants = _tiling(h, *size, 4)
    if grad_y is not None:
        out = h.new_empty(h.shape[0], blocks, h.shape[2])
    strides, offset_type = layout_of(h, C, u, grad_y, out)
    _fusion_kernel[(tiles * blocks,)](
        h, taps, C, D, u, grad_y, out, *strides, h.shape[1], *size, blocks, OFFSET=offset_type, **constants
    )
    return None if grad_y is None else out.sum(1)


def fuse_backward(grad, h, size, taps, grad_h, C=None):
    """The transposed fusion of ``grad``, or of C grad, into ``grad_h``; every map is (batch, dim, pixels).

    Returns the gradient of the taps, (25, dim).
    """
    batch, dim, _ = h.shape
    height, width = size
    memory_format = torch.channels_last if pixel_axis(h) == 0 else torch.contiguous_format
    shape = (batch, dim, height + 6, width + 6)
    folded = torch.empty(shape, device=h.device, dtype=torch.float32, memory_format=memory_format).flatten(2)
    tiles, blocks, constants = _tiling(folded, height + 6, width + 6, 4)
    strides, offset_type = layout_of(grad, C, folded)
    _fold_kernel[(tiles * blocks,)](
        grad, C, folded, *strides, dim, height, width, blocks, OFFSET=offset_type, **constants
    )
    tiles, blocks, constants = _tiling(h, height, width, 8)
    grad_taps = h.new_empty(tiles, len(TAPS), dim, dtype=torch.float32)
    strides, offset_type = layout_of(folded, h, grad_h)
    _fusion_backward_kernel[(tiles * blocks,)](
        folded, h, taps, grad_h, grad_taps, *strides, dim, height, width, blocks, OFFSET=offset_type, **constants
    )
    return grad_taps.sum(0)


def state_fusion(h, k1, k3, k5, alpha):
    """The fused states, float32, in the memory format of ``h``."""
    out = new_map(h, torch.float32)
    with torch.cuda.device_of(h):
        fuse(h.flatten(2), h.shape[2:], merge_taps((k1, k3, k5), alpha), out.flatten(2))
    return out


def state_fusion_backward(grad, h, k1, k3, k5, alpha):
    """The gradients of h, k1, k3, k5 and alpha."""
    grad_h = new_map(h)
    kernels = (k1, k3, k5)
    taps = merge_taps(kernels, alpha)
    with torch.cuda.device_of(h):
        grad_taps = fuse_backward(grad.flatten(2), h.flatten(2), h.shape[2:], taps, grad_h.flatten(2))
    return grad_h, *split_taps(grad_taps, kernels, alpha)
