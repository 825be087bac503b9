"""The selective scan in plain PyTorch, differentiable any number of times; the length is cut to run fast."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..library import compute_dtype

_DIRECT_LENGTH = 16


def _fill(decay: torch.Tensor, drive: torch.Tensor, state: torch.Tensor, out: torch.Tensor) -> None:
    """Write h_t = decay_t * h_(t-1) + drive_t into ``out`` (batch, length, width), starting from h = ``state``.

    The sequence is cut into about sqrt(length) chunks which advance side by side, twice: first from a zero state, which
    gives the scale and the sum that take a chunk's entering state to its leaving one, then, when these few have been
    scanned, from the true entering states. The factors are only ever multiplied, so nothing overflows where decay <= 1.
    """
    length = out.shape[1]
    if length <= _DIRECT_LENGTH:
        for t in range(length):
            state = torch.addcmul(drive[:, t], decay[:, t], state, out=out[:, t])
        return
    chunk = math.isqrt(length)
    chunks = length // chunk
    split = chunks * chunk
    decays, drives, outs = (x[:, :split].unflatten(1, (chunks, chunk)) for x in (decay, drive, out))
    scale, total = decays[:, :, 0].clone(), drives[:, :, 0].clone()
    for t in range(1, chunk):
        scale *= decays[:, :, t]
        torch.addcmul(drives[:, :, t], decays[:, :, t], total, out=total)
    leaving = torch.empty_like(total)
    _fill(scale, total, state, leaving)
    states = torch.cat([state.unsqueeze(1), leaving[:, :-1]], dim=1)
    for t in range(chunk):
        states = torch.addcmul(drives[:, :, t], decays[:, :, t], states, out=outs[:, :, t])
    if split < length:
        _fill(decay[:, split:], drive[:, split:], out[:, split - 1], out[:, split:])


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(decay, drive):
        # A step of the recurrence is to meet channels that lie side by side.
        decay, drive = decay.contiguous(), drive.contiguous()
        out = torch.empty_like(drive)
        _fill(decay, drive, out.new_zeros(out.shape[0], out.shape[2]), out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        decay, h = ctx.saved_tensors
        grad_drive = _reverse_recurrence(decay, grad)
        return grad_drive * _previous(h), grad_drive

    @staticmethod
    def jvp(ctx, decay_tangent, drive_tangent):
        decay, h = ctx.saved_tensors
        return linear_recurrence(decay, drive_tangent + decay_tangent * _previous(h))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        decay, drive = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(inputs, in_dims)
        )
        h = linear_recurrence(decay.flatten(0, 1), drive.flatten(0, 1))
        return h.unflatten(0, decay.shape[:2]), 0


def linear_recurrence(decay: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
    """h_t = decay_t * h_(t-1) + drive_t over dimension 1 of (batch, length, width) tensors, from a zero state."""
    return _LinearRecurrence.apply(decay, drive)


def _previous(h: torch.Tensor) -> torch.Tensor:
    """h_(t-1) at each t."""
    return torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)


def _reverse_recurrence(decay: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """G_t = grad_t + decay_(t+1) * G_(t+1), the gradient of the recurrence's drive."""
    following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
    return linear_recurrence(following.flip(1), grad.flip(1)).flip(1)


def time_step(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """``delta`` with its channels last, plus a bias if there is one, through softplus if asked for."""
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def selective_scan(u, delta, A, B, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B, delta_bias)
    u, delta, B = (x.to(dtype).transpose(1, 2) for x in (u, delta, B))
    A = A.to(dtype)
    dt = time_step(delta, delta_bias, delta_softplus)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    drive = (dt * u).unsqueeze(-1) * B.unsqueeze(2)
    h = linear_recurrence(decay.flatten(2), drive.flatten(2))
    return h.unflatten(2, A.shape).permute(0, 2, 3, 1)


def selective_scan_backward(grad, h, u, delta, A, B, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B, delta_bias)
    u, delta, B = (x.to(dtype).transpose(1, 2) for x in (u, delta, B))
    grad, h = (x.to(dtype).permute(0, 3, 1, 2) for x in (grad, h))
    A = A.to(dtype)
    dt = time_step(delta, delta_bias, delta_softplus)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    grad_state = _reverse_recurrence(decay.flatten(2), grad.flatten(2)).view_as(decay)
    grad_exponent = grad_state * _previous(h) * decay
    grad_drive = (grad_state * B.unsqueeze(2)).sum(3)
    grad_delta = (grad_exponent * A).sum(3) + grad_drive * u
    if delta_softplus:
        grad_delta = grad_delta * -torch.expm1(-dt)
    grad_bias = grad_delta.sum((0, 1))
    return (
        (grad_drive * dt).transpose(1, 2),
        grad_delta.transpose(1, 2),
        (grad_exponent * dt.unsqueeze(-1)).sum((0, 1)),
        (grad_state * (dt * u).unsqueeze(-1)).sum(2).transpose(1, 2),
        torch.zeros_like(grad_bias) if delta_bias is None else grad_bias,
    )
