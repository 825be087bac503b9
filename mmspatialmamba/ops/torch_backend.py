"""The ops in plain PyTorch: the truth every other backend is compared with, and the fallback.

Everything here is differentiable any number of times and computes in float32, or in float64 where an input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_DIRECT_LENGTH = 16


def _fill(decay, drive, state, out):
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
    """h_t = decay_t * h_(t-1) + drive_t over dimension 1 of (batch, length, width) tensors, from a zero state."""

    @staticmethod
    def forward(decay, drive):
        out = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
        _fill(decay, drive, out.new_zeros(out.shape[0], out.shape[2]), out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        decay, h = ctx.saved_tensors
        following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        grad_drive = _LinearRecurrence.apply(following.flip(1), grad.flip(1)).flip(1)
        previous = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        return grad_drive * previous, grad_drive


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _time_step(delta, bias, softplus):
    """``delta`` with its channels last, plus ``bias``, through softplus if asked for."""
    if bias is not None:
        delta = delta + bias
    return F.softplus(delta) if softplus else delta


def selective_scan(u, delta, A, B, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B)
    with torch.autocast(u.device.type, enabled=False):
        u, delta, B = (x.to(dtype).transpose(1, 2) for x in (u, delta, B))
        A = A.to(dtype)
        dt = _time_step(delta, None if delta_bias is None else delta_bias.to(dtype), delta_softplus)
        decay = torch.exp(dt.unsqueeze(-1) * A)
        drive = (dt * u).unsqueeze(-1) * B.unsqueeze(2)
        h = _LinearRecurrence.apply(decay.flatten(2), drive.flatten(2))
        return h.unflatten(2, A.shape).permute(0, 2, 3, 1)


def _dilated_depthwise_conv(h, kernel, dilation):
    """Replicate-padded depthwise 3x3 convolution.

    A dilated convolution is a dense one on each of the dilation^2 interleaved sub-maps. Splitting them off first costs
    two copies and saves much more, since PyTorch's CPU kernels are fast for dense depthwise kernels only.
    """
    batch, _, height, width = h.shape
    k = dilation
    padded = F.pad(h, (k, k + -width % k, k, k + -height % k), mode='replicate')
    submaps = padded.permute(0, 2, 3, 1).unflatten(1, (-1, k)).unflatten(3, (-1, k))
    submaps = submaps.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)
    fused = F.conv2d(submaps, kernel, groups=kernel.shape[0]).permute(0, 2, 3, 1)
    fused = fused.unflatten(0, (batch, k, k)).permute(0, 3, 1, 4, 2, 5).flatten(1, 2).flatten(2, 3)
    return fused[:, :height, :width].permute(0, 3, 1, 2)


def state_fusion(h, k1, k3, k5, alpha):
    dtype = compute_dtype(h, k1, k3, k5, alpha)
    with torch.autocast(h.device.type, enabled=False):
        h = h.to(dtype)
        return sum(
            _dilated_depthwise_conv(h, (weight.to(dtype) * kernel.to(dtype)), dilation)
            for kernel, weight, dilation in zip((k1, k3, k5), alpha, (1, 3, 5))
        )


def structure_aware_scan(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    height, width = u.shape[2:]
    dtype = compute_dtype(u, delta, A, B, C, D, k1, k3, k5, alpha)
    with torch.autocast(u.device.type, enabled=False):
        x, step, drive_in = (t.to(dtype).permute(0, 2, 3, 1).flatten(1, 2) for t in (u, delta, B))
        dt = _time_step(step, None if delta_bias is None else delta_bias.to(dtype), delta_softplus)
        decay = torch.exp(dt * A.to(dtype).flatten())
        h = _LinearRecurrence.apply(decay, dt * drive_in * x)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        g = state_fusion(h, k1, k3, k5, alpha)
        y = C.to(dtype) * g + D.to(dtype).view(-1, 1, 1) * u.to(dtype)
        return y.to(u.dtype)


def _opaque(function: Callable, dense_like_first: bool) -> Callable:
    """Make a kernel of a function: a fresh tensor, in the memory format of the first argument where asked for."""

    def kernel(*args):
        out = function(*args)
        like = torch.empty_like(args[0], dtype=out.dtype) if dense_like_first else out.new_empty(out.shape)
        return like.copy_(out)

    return kernel


def _backward(function: Callable, first: int) -> Callable:
    """The gradients of ``function`` from a recomputed forward pass.

    Args:
        function (Callable): An op of this module.
        first (int): Position of the op's first input among the arguments of its backward op.
    """

    def kernel(grad, *args):
        inputs = args[first - 1 :]
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]

        def of_tensors(*values):
            values = iter(values)
            return function(*(next(values) if isinstance(t, torch.Tensor) else t for t in inputs))

        _, vjp = torch.func.vjp(of_tensors, *tensors)
        gradients = [torch.empty_like(t).copy_(g) for t, g in zip(tensors, vjp(grad))]
        if None in inputs:
            gradients.append(inputs[2].new_zeros(inputs[2].shape[0]))
        return tuple(gradients)

    return kernel


KERNELS = {
    'selective_scan': _opaque(selective_scan, dense_like_first=False),
    'selective_scan_backward': _backward(selective_scan, 2),
    'state_fusion': _opaque(state_fusion, dense_like_first=True),
    'state_fusion_backward': _backward(state_fusion, 1),
    'structure_aware_scan': _opaque(structure_aware_scan, dense_like_first=True),
    'structure_aware_scan_backward': _backward(structure_aware_scan, 1),
}
