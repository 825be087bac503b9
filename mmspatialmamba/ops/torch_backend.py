"""The ops in plain PyTorch: the truth every other backend is compared with, and the fallback.

Everything here is differentiable any number of times. The scans and the fusion compute in float32, or in float64 where
an input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .precision import in_fast_precision

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
        # A step of the recurrence is to meet channels that lie side by side.
        decay, drive = decay.contiguous(), drive.contiguous()
        out = torch.empty_like(drive)
        _fill(decay, drive, out.new_zeros(out.shape[0], out.shape[2]), out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        decay, h = ctx.saved_tensors
        grad_drive = _reverse_scan(decay, grad)
        return grad_drive * _previous(h), grad_drive


def _previous(h):
    """h_(t-1) at each t."""
    return torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)


def _reverse_scan(decay, grad):
    """G_t = grad_t + decay_(t+1) * G_(t+1), the gradient of the recurrence's drive."""
    following = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
    return _LinearRecurrence.apply(following.flip(1), grad.flip(1)).flip(1)


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


def selective_scan_backward(grad, h, u, delta, A, B, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B)
    u, delta, B = (x.to(dtype).transpose(1, 2) for x in (u, delta, B))
    grad, h = (x.to(dtype).permute(0, 3, 1, 2) for x in (grad, h))
    A = A.to(dtype)
    dt = _time_step(delta, None if delta_bias is None else delta_bias.to(dtype), delta_softplus)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    grad_state = _reverse_scan(decay.flatten(2), grad.flatten(2)).view_as(decay)
    grad_exponent = grad_state * _previous(h) * decay
    grad_drive = (grad_state * B.unsqueeze(2)).sum(3)
    grad_delta = (grad_exponent * A).sum(3) + grad_drive * u
    if delta_softplus:
        grad_delta = grad_delta * -torch.expm1(-dt)
    return (
        (grad_drive * dt).transpose(1, 2),
        grad_delta.transpose(1, 2),
        (grad_exponent * dt.unsqueeze(-1)).sum((0, 1)),
        (grad_state * (dt * u).unsqueeze(-1)).sum(2).transpose(1, 2),
        grad_delta.sum((0, 1)),
    )


def _split(x, k):
    """The k^2 interleaved sub-maps of a map whose height and width are multiples of k, side by side in the batch."""
    submaps = x.permute(0, 2, 3, 1).unflatten(1, (-1, k)).unflatten(3, (-1, k))
    return submaps.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _unite(submaps, k):
    """The inverse of ``_split``."""
    x = submaps.permute(0, 2, 3, 1).unflatten(0, (-1, k, k)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)


def _pad_and_split(h, k):
    """Replicate ``h`` by k pixels a side, and on to a multiple of k, and split it."""
    height, width = h.shape[2:]
    return _split(F.pad(h, (k, k + -width % k, k, k + -height % k), mode='replicate'), k)


def _dilated_depthwise_conv(h, kernel, dilation):
    """Replicate-padded depthwise 3x3 convolution.

    A dilated convolution is a dense one on each of the dilation^2 interleaved sub-maps. Splitting them off first costs
    two copies and saves much more, since PyTorch's CPU kernels are fast for dense depthwise kernels only.
    """
    fused = _unite(F.conv2d(_pad_and_split(h, dilation), kernel, groups=kernel.shape[0]), dilation)
    return fused[:, :, : h.shape[2], : h.shape[3]]


def _fold(x, k, dim):
    """Add the outer k rows (or columns) of each side to the one next to them, which they replicate."""
    before, inside, after = x.split([k, x.shape[dim] - 2 * k, k], dim)
    inside = inside.clone()
    inside.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
    inside.narrow(dim, -1, 1).add_(after.sum(dim, keepdim=True))
    return inside


def _dilated_depthwise_conv_backward(grad, h, kernel, dilation):
    k, groups = dilation, kernel.shape[0]
    height, width = h.shape[2:]
    submaps = _pad_and_split(h, k)
    grad = _split(F.pad(grad, (0, -width % k, 0, -height % k)), k)
    padded = _unite(torch.nn.grad.conv2d_input(submaps.shape, kernel, grad, groups=groups), k)
    grad_h = _fold(_fold(padded[:, :, : height + 2 * k, : width + 2 * k], k, 2), k, 3)
    return grad_h, torch.nn.grad.conv2d_weight(submaps, kernel.shape, grad, groups=groups)


def state_fusion(h, k1, k3, k5, alpha):
    dtype = compute_dtype(h, k1, k3, k5, alpha)
    with torch.autocast(h.device.type, enabled=False):
        h = h.to(dtype)
        return sum(
            _dilated_depthwise_conv(h, (weight.to(dtype) * kernel.to(dtype)), dilation)
            for kernel, weight, dilation in zip((k1, k3, k5), alpha, (1, 3, 5))
        )


def state_fusion_backward(grad, h, k1, k3, k5, alpha):
    dtype = compute_dtype(h, k1, k3, k5, alpha)
    grad, h, alpha = (x.to(dtype) for x in (grad, h, alpha))
    kernels = [k.to(dtype) for k in (k1, k3, k5)]
    grads_h, grads_weighted = zip(
        *(
            _dilated_depthwise_conv_backward(grad, h, weight * kernel, dilation)
            for kernel, weight, dilation in zip(kernels, alpha, (1, 3, 5))
        )
    )
    grads_kernel = [weight * g for weight, g in zip(alpha, grads_weighted)]
    grad_alpha = torch.stack([(kernel * g).sum() for kernel, g in zip(kernels, grads_weighted)])
    return (sum(grads_h), *grads_kernel, grad_alpha)


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


def structure_aware_scan_backward(grad, u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    dtype = compute_dtype(u, delta, A, B, C, D, k1, k3, k5, alpha)
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


def depthwise_conv(x, weight, bias, finish):
    out = in_fast_precision(partial(F.conv2d, padding=1, groups=x.shape[1]), x, weight, bias)
    if finish == 'silu':
        return F.silu(out)
    return x + out if finish == 'residual' else out


def downsampling_conv(x, weight, bias):
    return F.conv2d(x.relu(), weight, bias, stride=2, padding=1, groups=x.shape[1]).relu()


def gated_layer_norm(x, gate, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * F.silu(gate)


def biased_gelu(x, bias):
    return F.gelu(x + bias)


def gelu_linear(x, gelu_bias, weight, bias):
    return F.linear(F.gelu(x + gelu_bias), weight, bias)


def _opaque(function: Callable, dense_like_first: bool) -> Callable:
    """Make a kernel of a function: a fresh tensor, in the memory format of the first argument where asked for."""

    def kernel(*args):
        out = function(*args)
        like = torch.empty_like(args[0], dtype=out.dtype) if dense_like_first else out.new_empty(out.shape)
        return like.copy_(out)

    return kernel


def _opaque_backward(function: Callable, first: int) -> Callable:
    """Make a kernel of a backward function: fresh tensors, like its inputs in dtype and memory format.

    Args:
        function (Callable): Returns a gradient for each tensor that the op takes, the optional bias included.
        first (int): Position of the op's first input among the arguments.
    """

    def kernel(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            gradients = function(*args)
        inputs = [t for t in args[first:] if not isinstance(t, bool)]
        return tuple(
            inputs[2].new_zeros(inputs[2].shape[0]) if t is None else torch.empty_like(t).copy_(gradient)
            for t, gradient in zip(inputs, gradients)
        )

    return kernel


KERNELS = {
    'selective_scan': _opaque(selective_scan, dense_like_first=False),
    'selective_scan_backward': _opaque_backward(selective_scan_backward, 2),
    'state_fusion': _opaque(state_fusion, dense_like_first=True),
    'state_fusion_backward': _opaque_backward(state_fusion_backward, 1),
    'structure_aware_scan': _opaque(structure_aware_scan, dense_like_first=True),
    'structure_aware_scan_backward': _opaque_backward(structure_aware_scan_backward, 1),
}
