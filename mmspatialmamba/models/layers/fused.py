"""Fusions across modules: the same mathematics in fewer passes over memory, or with fewer tensors kept for backward.

Each function takes modules and computes what calling them in turn computes. It does so in a fused way only where all of
them are plain (:func:`_are_plain`), and calls them otherwise. Backward passes run in the context of their forward pass:
with its autocast state, and on its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mmspatialmamba import compat
from mmspatialmamba.ops import depthwise_conv, gated_layer_norm, structure_aware_scan, structure_aware_scan_backward

_FORWARDS: dict[type, Callable] = {cls: cls.forward for cls in (nn.Conv2d, nn.LayerNorm, nn.Linear)}
_NAMES = {'weight', 'bias'}
_TENSORS = (nn.Parameter, torch.Tensor)
_GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1), 'zeros')


def _are_plain(*modules: nn.Module) -> bool:
    """Check that nobody could tell a fused computation from calls of the modules.

    All modules are exactly the torch class they were built as, without hooks, parametrizations or a ``forward`` of
    their own, with plain tensors as parameters; convolutions are depthwise, 3x3 and zero-padded. Global hooks count as
    hooks. Compilers, tracers and function transforms get the modules: they fuse and recompute on their own.

    ``forward_ad._current_level`` has no public equivalent (torch 2.1 to 2.14).
    """
    if (
        compat.is_compiling()
        or torch.jit.is_tracing()
        or compat.has_global_hooks()
        or compat.are_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    for module in modules:
        own = module.__dict__
        if (
            _FORWARDS.get(type(module)) is not type(module).forward
            or 'forward' in own
            or own['_forward_hooks']
            or own['_forward_pre_hooks']
            or own['_backward_hooks']
            or own['_backward_pre_hooks']
            or own['_parameters'].keys() != _NAMES
        ):
            return False
        for parameter in own['_parameters'].values():
            # A linear layer may have no bias.
            if type(parameter) not in _TENSORS and (parameter is not None or type(module) is not nn.Linear):
                return False
        if type(module) is nn.Conv2d:
            per_group = module.in_channels // module.groups, module.out_channels // module.groups
            geometry = module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
            if per_group != (1, 1) or geometry != _GEOMETRY:
                return False
    return True


def depthwise_conv_silu(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a depthwise convolution, then SiLU.

    Args:
        conv (nn.Conv2d): Depthwise 3x3 convolution, or what stands in its place.
        x (Tensor): Input, (batch, channels, height, width), any floating dtype.

    Returns:
        Tensor: ``silu(conv(x))``.
    """
    if _are_plain(conv):
        return depthwise_conv(x, conv.weight, conv.bias, 'silu')  # type: ignore[arg-type]
    return F.silu(conv(x))


def depthwise_conv_residual(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a depthwise convolution, and add its input.

    Args:
        conv (nn.Conv2d): Depthwise 3x3 convolution, or what stands in its place.
        x (Tensor): Input, (batch, channels, height, width), any floating dtype.

    Returns:
        Tensor: ``x + conv(x)``.
    """
    if _are_plain(conv):
        return depthwise_conv(x, conv.weight, conv.bias, 'residual')  # type: ignore[arg-type]
    return x + conv(x)


def layer_norm_linear(norm: nn.LayerNorm, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply LayerNorm, then a linear layer; the normalised tensor is recomputed in backward instead of kept.

    Args:
        norm (nn.LayerNorm): LayerNorm over the last dimension, or what stands in its place.
        linear (nn.Linear): Linear layer, or what stands in its place.
        x (Tensor): Input, (..., channels), any floating dtype.

    Returns:
        Tensor: ``linear(norm(x))``.
    """
    if torch.is_grad_enabled() and _are_plain(norm, linear):
        normalise = partial(_layer_norm, norm.eps)
        rows = x.reshape(-1, x.shape[-1])
        y = _RecomputedLinear.apply(normalise, linear.weight, linear.bias, rows, norm.weight, norm.bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    return linear(norm(x))


def gelu_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply GELU, then a linear layer; GELU's output is recomputed in backward instead of kept.

    Args:
        linear (nn.Linear): Linear layer, or what stands in its place.
        x (Tensor): Input, (..., channels), any floating dtype.

    Returns:
        Tensor: ``linear(gelu(x))``.
    """
    if torch.is_grad_enabled() and _are_plain(linear):
        y = _RecomputedLinear.apply(F.gelu, linear.weight, linear.bias, x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])
    return linear(F.gelu(x))


def gated_layer_norm_linear(norm: nn.LayerNorm, linear: nn.Linear, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Apply LayerNorm, a SiLU gate and a linear layer; the gated tensor is recomputed in backward instead of kept.

    Args:
        norm (nn.LayerNorm): LayerNorm over the last dimension, or what stands in its place.
        linear (nn.Linear): Linear layer, or what stands in its place.
        x (Tensor): Input, (..., channels), any floating dtype.
        gate (Tensor): Gate before SiLU, of the shape of ``x``.

    Returns:
        Tensor: ``linear(norm(x) * silu(gate))``.
    """
    if torch.is_grad_enabled() and _are_plain(norm, linear):
        gated = partial(gated_layer_norm, eps=norm.eps)
        rows, gates = x.reshape(-1, x.shape[-1]), gate.reshape(-1, gate.shape[-1])
        y = _RecomputedLinear.apply(gated, linear.weight, linear.bias, rows, gates, norm.weight, norm.bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    if _are_plain(norm):
        return linear(gated_layer_norm(x, gate, norm.weight, norm.bias, norm.eps))
    return linear(norm(x) * F.silu(gate))


def linear_scan(
    dt_proj: nn.Linear,
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    alpha: torch.Tensor,
    dt_bias: torch.Tensor,
) -> torch.Tensor:
    """Project the time steps, then scan; the projected time steps are recomputed in backward instead of kept.

    Args:
        dt_proj (nn.Linear): Linear layer without bias from ``rank`` to ``dim``, or what stands in its place.
        u (Tensor): Input of the scan, (batch, dim, height, width), any floating dtype.
        dt (Tensor): Time steps before the projection, (batch, height, width, rank).
        A, B, C, D, kernels, alpha, dt_bias: As in :func:`mmspatialmamba.ops.structure_aware_scan`.

    Returns:
        Tensor: The scan's output, of the shape and dtype of ``u``.
    """
    if torch.is_grad_enabled() and _are_plain(dt_proj) and dt_proj.bias is None:
        return _RecomputedScan.apply(dt_proj.weight, dt, u, A, B, C, D, *kernels, alpha, dt_bias)
    return structure_aware_scan(u, dt_proj(dt).permute(0, 3, 1, 2), A, B, C, D, kernels, alpha, dt_bias)


def _layer_norm(eps: float, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _autocast_state(device: str) -> Callable[[], AbstractContextManager]:
    """Capture autocast's state, for a backward pass that computes in the dtypes of its forward pass.

    Its cache of weights is off: a weight that is cast without a graph must not serve a call that needs one.
    """
    if not compat.is_autocast_available(device):
        return nullcontext
    dtype, enabled = compat.get_autocast_dtype(device), compat.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _leaves(tensors: Sequence[torch.Tensor], create_graph: bool) -> list[torch.Tensor]:
    """Let gradients of a recomputed tensor stop at its inputs, to which a created graph leads on."""
    return [t.view_as(t) if create_graph else t.detach().requires_grad_(t.requires_grad) for t in tensors]


class _RecomputedLinear(torch.autograd.Function):
    """``linear(function(*inputs))`` of (rows, channels) that keeps the inputs, and computes the function again."""

    @staticmethod
    def forward(ctx: Any, function: Callable, weight: torch.Tensor, bias: torch.Tensor | None, *inputs: torch.Tensor):
        ctx.function, ctx.context, ctx.autocast = function, copy_context(), _autocast_state(weight.device.type)
        ctx.save_for_backward(weight, *inputs)
        with ctx.autocast():
            return F.linear(function(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        return ctx.context.copy().run(_RecomputedLinear._gradients, ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor):
        weight, *inputs = ctx.saved_tensors
        _, of_weight, of_bias, *of_inputs = ctx.needs_input_grad
        create_graph = torch.is_grad_enabled()
        grads: list[torch.Tensor | None] = [None] * (len(inputs) + 3)
        with ctx.autocast():
            with torch.enable_grad():
                leaves = _leaves(inputs, create_graph)
                hidden = ctx.function(*leaves)
            if of_weight:
                grads[1] = grad.t() @ hidden.to(grad.dtype)
            if of_bias:
                grads[2] = grad.sum(0)
            if any(of_inputs):
                grad_hidden = (grad @ weight.to(grad.dtype)).to(hidden.dtype)
                needed = [leaf for leaf, needs in zip(leaves, of_inputs) if needs]
                found = iter(torch.autograd.grad(hidden, needed, grad_hidden, create_graph=create_graph))
                grads[3:] = [next(found) if needs else None for needs in of_inputs]
        return tuple(grads)


class _RecomputedScan(torch.autograd.Function):
    """The scan of ``linear(dt)`` that keeps ``dt``, and projects it again."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, dt: torch.Tensor, u: torch.Tensor, *parameters: Any):
        ctx.context, ctx.autocast = copy_context(), _autocast_state(u.device.type)
        ctx.save_for_backward(weight, dt, u, *parameters)
        *matrices, k1, k3, k5, alpha, dt_bias = parameters
        with ctx.autocast():
            delta = F.linear(dt, weight).permute(0, 3, 1, 2)
            arguments: Any = u, delta, *matrices, (k1, k3, k5), alpha, dt_bias
            return structure_aware_scan(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        return ctx.context.copy().run(_RecomputedScan._gradients, ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor):
        weight, dt, u, *matrices, k1, k3, k5, alpha, dt_bias = ctx.saved_tensors
        with ctx.autocast():
            delta = F.linear(dt, weight).permute(0, 3, 1, 2)
            arguments = u, delta, *matrices, (k1, k3, k5), alpha, dt_bias
            grad_u, grad_delta, *grads = structure_aware_scan_backward(grad, *arguments)
            grad_delta = grad_delta.permute(0, 2, 3, 1)
            rows, steps = grad_delta.reshape(-1, delta.shape[1]), dt.reshape(-1, dt.shape[-1])
            grad_weight, grad_dt = rows.t() @ steps.to(rows.dtype), grad_delta @ weight.to(rows.dtype)
        return grad_weight, grad_dt, grad_u, *grads
