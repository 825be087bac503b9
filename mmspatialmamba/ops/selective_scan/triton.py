"""The selective scan: the pixels are cut into chunks, which run side by side.

With more than one chunk a first pass gives each chunk's decay, from its first pixel to its last, and the state it ends
with if it starts from zero; the second pass combines those of the chunks before its own into the state it starts from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_tiles import layout_of, load, mask_of, pixel_axis, power_of_two, sigmoid, softplus, store, tile_of

_PROGRAMS = 1024
_MOST_CHUNKS = 64


@triton.jit
def _combine(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _place(bias, dim, blocks, chunks, OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr, CHANNELS: tl.constexpr):
    """Which part a program has: batch, block of channels, chunk, channels, and the bias of these as a tile."""
    program = tl.program_id(0).to(OFFSET)
    block = program // chunks % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    value = tl.full((CHANNELS,), 0.0, tl.float32)
    if bias is not None:
        value += load(bias + channel, channel < dim)
    return program // chunks // blocks, block, program % chunks, channel, tl.expand_dims(value, PIXEL_AXIS)


@triton.jit
def _pick(tile, where, AXIS: tl.constexpr):
    """The values at the one place of the axis that ``where`` marks."""
    return tl.sum(tl.where(where, tile, 0.0), AXIS)


@triton.jit
def _entering_states(
    decays, ends, batch, chunk, chunks, channel, dim, state,
    REVERSE: tl.constexpr, SUMMARY: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The states (STATE, CHANNELS) a chunk starts from: zero, or what the chunks before it, or after it, leave."""
    entering = tl.full((STATE, CHANNELS), 0.0, tl.float32)
    if CHUNKS > 1 and not SUMMARY:
        other = tl.arange(0, CHUNKS)
        if REVERSE:
            mask = ((other > chunk) & (other < chunks))[:, None] & (channel < dim)[None, :]
            end = 0
        else:
            mask = (other < chunk)[:, None] & (channel < dim)[None, :]
            end = CHUNKS - 1
        for n in range(state):
            offset = ((batch * chunks + other[:, None]) * state + n) * dim + channel[None, :]
            decay = tl.load(decays + offset, mask=mask, other=1.0)
            left = tl.load(ends + offset, mask=mask, other=0.0)
            decay, left = tl.associative_scan((decay, left), 0, _combine, reverse=REVERSE)
            left = _pick(left, (other == end)[:, None], 0)
            entering = tl.where((tl.arange(0, STATE) == n)[:, None], left[None, :], entering)
    return entering


@triton.jit
def _scan_kernel(
    u, delta, A, B, bias, decays, ends, h,
    u_strides, delta_strides, A_strides, B_strides, h_strides,
    dim, state, length, blocks, chunks, chunk_length,
    SUMMARY: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr,
    CHUNKS: tl.constexpr, STATE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A chunk's states into ``h`` or, if SUMMARY, its decay and end state into ``decays`` and ``ends``."""
    batch, _, chunk, channel, step_bias = _place(bias, dim, blocks, chunks, OFFSET, PIXEL_AXIS, CHANNELS)
    number = tl.arange(0, STATE)
    row = tl.arange(0, PIXELS)
    first = tl.expand_dims(row == 0, 1 - PIXEL_AXIS)
    last = tl.expand_dims(row == PIXELS - 1, 1 - PIXEL_AXIS)
    decay_products = tl.full((STATE, CHANNELS), 1.0, tl.float32)
    states = _entering_states(
        decays, ends, batch, chunk, chunks, channel, dim, state, False, SUMMARY, CHUNKS, STATE, CHANNELS
    )
    start = chunk * chunk_length
    for begin in range(start, tl.minimum(start + chunk_length, length), PIXELS):
        pixel = begin + row
        mask = mask_of(channel < dim, pixel < length, PIXEL_AXIS)
        x = load(tile_of(delta, delta_strides, batch, channel, pixel, PIXEL_AXIS), mask) + step_bias
        step = softplus(x) if SOFTPLUS else x
        value = load(tile_of(u, u_strides, batch, channel, pixel, PIXEL_AXIS), mask)
        for n in range(state):
            this = (number == n)[:, None]
            rate = tl.expand_dims(load(A + channel * A_strides[0] + n * A_strides[1], channel < dim), PIXEL_AXIS)
            weight = load(B + batch * B_strides[0] + n * B_strides[1] + pixel * B_strides[2], pixel < length)
            decay = tl.where(mask, tl.exp(step * rate), 1.0)
            drive = step * tl.expand_dims(weight, 1 - PIXEL_AXIS) * value
            entering = tl.expand_dims(_pick(states, this, 0), PIXEL_AXIS)
            drive = tl.where(first, decay * entering + drive, drive)
            product, out = tl.associative_scan((decay, drive), PIXEL_AXIS, _combine)
            states = tl.where(this, _pick(out, last, PIXEL_AXIS)[None, :], states)
            if SUMMARY:
                product = _pick(product, last, PIXEL_AXIS) * _pick(decay_products, this, 0)
                decay_products = tl.where(this, product[None, :], decay_products)
            else:
                plane = h + tl.cast(n, OFFSET) * h_strides[3]
                store(tile_of(plane, h_strides, batch, channel, pixel, PIXEL_AXIS), out, mask)
    if SUMMARY:
        offset = ((batch * chunks + chunk) * state + number[:, None]) * dim + channel[None, :]
        mask = (number < state)[:, None] & (channel < dim)[None, :]
        tl.store(decays + offset, decay_products, mask=mask)
        tl.store(ends + offset, states, mask=mask)


@triton.jit
def _reverse_scan_kernel(
    grad_h, h, u, delta, A, B, bias, grad_y, D, decays, ends,
    grad_u, grad_delta, grad_A, grad_B, grad_bias, grad_D,
    grad_h_strides, h_strides, u_strides, delta_strides, A_strides, B_strides,
    grad_y_strides, grad_u_strides, grad_delta_strides,
    dim, state, length, blocks, chunks, chunk_length,
    SUMMARY: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, PIXEL_AXIS: tl.constexpr,
    CHUNKS: tl.constexpr, STATE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A chunk's gradients or, if SUMMARY, what it passes on to the pixels before it.

    The whole gradient of a state is G_t = grad_h_t + decay_(t+1) G_(t+1). ``grad_A``, ``grad_B``, ``grad_bias`` and
    ``grad_D`` receive sums over the program's own pixels or channels. ``grad_y`` and ``D``, if given, add y = D u.
    """
    batch, block, chunk, channel, step_bias = _place(bias, dim, blocks, chunks, OFFSET, PIXEL_AXIS, CHANNELS)
    number = tl.arange(0, STATE)
    row = tl.arange(0, PIXELS)
    first = tl.expand_dims(row == 0, 1 - PIXEL_AXIS)
    last = tl.expand_dims(row == PIXELS - 1, 1 - PIXEL_AXIS)
    decay_products = tl.full((STATE, CHANNELS), 1.0, tl.float32)
    A_sums = tl.full((STATE, CHANNELS), 0.0, tl.float32)
    bias_sums = tl.full((CHANNELS,), 0.0, tl.float32)
    D_sums = tl.full((CHANNELS,), 0.0, tl.float32)
    states = _entering_states(
        decays, ends, batch, chunk, chunks, channel, dim, state, True, SUMMARY, CHUNKS, STATE, CHANNELS
    )
    start = chunk * chunk_length
    tiles = (tl.minimum(chunk_length, length - start) + PIXELS - 1) // PIXELS
    for tile in range(tiles):
        pixel = start + (tiles - 1 - tile) * PIXELS + row
        mask = mask_of(channel < dim, pixel < length, PIXEL_AXIS)
        next_mask = mask_of(channel < dim, pixel + 1 < length, PIXEL_AXIS)
        x = load(tile_of(delta, delta_strides, batch, channel, pixel + 1, PIXEL_AXIS), next_mask) + step_bias
        next_step = softplus(x) if SOFTPLUS else x
        if not SUMMARY:
            x = load(tile_of(delta, delta_strides, batch, channel, pixel, PIXEL_AXIS), mask) + step_bias
            step = softplus(x) if SOFTPLUS else x
            value = load(tile_of(u, u_strides, batch, channel, pixel, PIXEL_AXIS), mask)
            value_grad = tl.full(value.shape, 0.0, tl.float32)
            step_grad = tl.full(value.shape, 0.0, tl.float32)
        for n in range(state):
            this = (number == n)[:, None]
            rate = tl.expand_dims(load(A + channel * A_strides[0] + n * A_strides[1], channel < dim), PIXEL_AXIS)
            plane = grad_h + tl.cast(n, OFFSET) * grad_h_strides[3]
            grad = load(tile_of(plane, grad_h_strides, batch, channel, pixel, PIXEL_AXIS), mask)
            next_decay = tl.where(next_mask, tl.exp(next_step * rate), 1.0)
            entering = tl.expand_dims(_pick(states, this, 0), PIXEL_AXIS)
            grad = tl.where(last, next_decay * entering + grad, grad)
            product, total = tl.associative_scan((next_decay, grad), PIXEL_AXIS, _combine, reverse=True)
            states = tl.where(this, _pick(total, first, PIXEL_AXIS)[None, :], states)
            if SUMMARY:
                product = _pick(product, first, PIXEL_AXIS) * _pick(decay_products, this, 0)
                decay_products = tl.where(this, product[None, :], decay_products)
            else:
                weight = load(B + batch * B_strides[0] + n * B_strides[1] + pixel * B_strides[2], pixel < length)
                weight = tl.expand_dims(weight, 1 - PIXEL_AXIS)
                plane = h + tl.cast(n, OFFSET) * h_strides[3]
                previous_mask = mask & tl.expand_dims(pixel > 0, 1 - PIXEL_AXIS)
                previous = load(tile_of(plane, h_strides, batch, channel, pixel - 1, PIXEL_AXIS), previous_mask)
                exponent_grad = total * previous * tl.exp(step * rate)
                value_grad += total * step * weight
                step_grad += exponent_grad * rate + total * weight * value
                A_sum = tl.sum(exponent_grad * step, PIXEL_AXIS) + _pick(A_sums, this, 0)
                A_sums = tl.where(this, A_sum[None, :], A_sums)
                B_sum = tl.sum(total * step * value, 1 - PIXEL_AXIS)
                offset = ((batch * blocks + block) * state + n) * length + pixel
                tl.store(grad_B + offset, B_sum, mask=pixel < length)
        if not SUMMARY:
            if SOFTPLUS:
                step_grad *= sigmoid(x)
            store(tile_of(grad_delta, grad_delta_strides, batch, channel, pixel, PIXEL_AXIS), step_grad, mask)
            bias_sums += tl.sum(tl.where(mask, step_grad, 0.0), PIXEL_AXIS)
            if grad_y is not None:
                skip = load(tile_of(grad_y, grad_y_strides, batch, channel, pixel, PIXEL_AXIS), mask)
                value_grad += skip * tl.expand_dims(load(D + channel, channel < dim), PIXEL_AXIS)
                D_sums += tl.sum(skip * value, PIXEL_AXIS)
            store(tile_of(grad_u, grad_u_strides, batch, channel, pixel, PIXEL_AXIS), value_grad, mask)
    offset = ((batch * chunks + chunk) * state + number[:, None]) * dim + channel[None, :]
    mask = (number < state)[:, None] & (channel < dim)[None, :]
    if SUMMARY:
        tl.store(decays + offset, decay_products, mask=mask)
        tl.store(ends + offset, states, mask=mask)
    else:
        tl.store(grad_A + offset, A_sums, mask=mask)
        offset = (batch * chunks + chunk) * dim + channel
        tl.store(grad_bias + offset, bias_sums, mask=channel < dim)
        if grad_y is not None:
            tl.store(grad_D + offset, D_sums, mask=channel < dim)


class _Launch:
    """How a scan over ``u``, (batch, dim, pixels), is cut up, and the buffers through which its chunks meet.

    ``maps`` are the tensors whose strides its kernels take, in this order.
    """

    def __init__(self, u: torch.Tensor, state: int, *maps: torch.Tensor | None):
        batch, dim, length = u.shape
        axis = pixel_axis(u)
        channels, pixels = (32, 32) if axis == 0 else (8, 128)
        channels, pixels = power_of_two(dim, channels), power_of_two(length, pixels)
        self.blocks = triton.cdiv(dim, channels)
        tiles = max(triton.cdiv(length, pixels), 1)
        chunks = min(triton.cdiv(_PROGRAMS, max(batch * self.blocks, 1)), _MOST_CHUNKS, tiles)
        tiles_each = triton.cdiv(tiles, chunks)
        self.chunks = triton.cdiv(tiles, tiles_each)
        self.grid = (batch * self.blocks * self.chunks,)
        self.summaries = u.new_empty(2, batch, self.chunks, state, dim, dtype=torch.float32)
        strides, offset_type = layout_of(*maps)
        self.sizes = (*strides, dim, state, length, self.blocks, self.chunks, tiles_each * pixels)
        self.constants = dict(OFFSET=offset_type, PIXEL_AXIS=axis, CHANNELS=channels, PIXELS=pixels, num_warps=4)
        self.constants |= dict(CHUNKS=triton.next_power_of_2(self.chunks), STATE=triton.next_power_of_2(state))

    def run(self, kernel, *arguments, SOFTPLUS):
        for summary in (True, False) if self.chunks > 1 else (False,):
            kernel[self.grid](*arguments, *self.sizes, SUMMARY=summary, SOFTPLUS=SOFTPLUS, **self.constants)


def scan_into(h, u, delta, A, B, delta_bias, delta_softplus):
    """Write the states of :func:`selective_scan` into ``h``, of any strides."""
    h = h.transpose(2, 3)
    bias = None if delta_bias is None else delta_bias.contiguous()
    launch = _Launch(u, A.shape[1], u, delta, A, B, h)
    launch.run(_scan_kernel, u, delta, A, B, bias, *launch.summaries, h, SOFTPLUS=delta_softplus)


def reverse_scan(grad_h, h, u, delta, A, B, delta_bias, delta_softplus, grad_u, grad_delta, grad_y=None, D=None):
    """The gradients of a scan, and of y = D u if ``grad_y`` and ``D`` are given.

    Writes ``grad_u`` and ``grad_delta`` and returns those of A, B, delta_bias and D in float32.
    """
    batch, dim, length = u.shape
    state = A.shape[1]
    h, grad_h = h.transpose(2, 3), grad_h.transpose(2, 3)
    bias = None if delta_bias is None else delta_bias.contiguous()
    launch = _Launch(u, state, grad_h, h, u, delta, A, B, grad_y, grad_u, grad_delta)
    grad_A = u.new_empty(batch, launch.chunks, state, dim, dtype=torch.float32)
    grad_B = u.new_empty(batch, launch.blocks, state, length, dtype=torch.float32)
    grad_bias = u.new_empty(batch, launch.chunks, dim, dtype=torch.float32)
    grad_D = None if D is None else torch.empty_like(grad_bias)
    launch.run(
        _reverse_scan_kernel, grad_h, h, u, delta, A, B, bias, grad_y, D, *launch.summaries,
        grad_u, grad_delta, grad_A, grad_B, grad_bias, grad_D, SOFTPLUS=delta_softplus,
    )  # fmt: skip
    return grad_A.sum((0, 1)).t(), grad_B.sum(1), grad_bias.sum((0, 1)), None if D is None else grad_D.sum((0, 1))


def bias_gradient(gradient, delta_bias):
    """In the bias's dtype, and zeros where there is none."""
    return torch.zeros_like(gradient) if delta_bias is None else gradient.to(delta_bias.dtype)


def selective_scan(u, delta, A, B, delta_bias, delta_softplus):
    """The states h, (batch, dim, state, length), float32 and contiguous."""
    h = u.new_empty(u.shape[0], u.shape[1], A.shape[1], u.shape[2], dtype=torch.float32)
    with torch.cuda.device_of(u):
        scan_into(h, u, delta, A, B, delta_bias, delta_softplus)
    return h


def selective_scan_backward(grad, h, u, delta, A, B, delta_bias, delta_softplus):
    """The gradients of u, delta, A, B and delta_bias."""
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    with torch.cuda.device_of(u):
        grad_A, grad_B, grad_bias, _ = reverse_scan(
            grad, h, u, delta, A, B, delta_bias, delta_softplus, grad_u, grad_delta
        )
    return grad_u, grad_delta, grad_A.to(A.dtype), grad_B.to(B.dtype), bias_gradient(grad_bias, delta_bias)
