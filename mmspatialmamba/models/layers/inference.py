"""What the layers compute where no gradients are needed, in as few ops as there are.

A layer is computed this way if it is as it was built: in evaluation mode, all its modules of their own types, without
hooks, all its parameters in float32. Else, say with LoRA's modules within or with a hook that collects features, each
module is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmspatialmamba.ops import inference, linear
from mmspatialmamba.ops.inference import fuses_layers, gated_output, norm_linear, norm_mlp


def is_untouched(module: nn.Module, own_types: tuple[type, ...]) -> bool:
    """Whether a module is of one of its own types and nobody has hooks on it, so that calling it can be left out.

    Args:
        module (nn.Module): The module, without what it contains.
        own_types (tuple[type]): Its types.
    """
    own_hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return type(module) in own_types and not own_hooks and not nn.modules.module._has_any_global_hook()


def _is_plain(module: nn.Module, own_types: tuple[type, ...]) -> bool:
    """Whether a module is as it was built, see above."""
    for m in module.modules():
        foldable = isinstance(m, _BatchNorm) and m.track_running_stats and m.affine
        if m.training or not is_untouched(m, (type(m),) if foldable else own_types):
            return False
        if any(p is not None and p.dtype != torch.float32 for p in m._parameters.values()):
            return False
    return True


def can_fuse(module: nn.Module, x: torch.Tensor, own_types: tuple[type, ...]) -> bool:
    """Whether to compute a layer by this module's functions.

    Args:
        module (nn.Module): The layer.
        x (Tensor): Its input.
        own_types (tuple[type]): Types of the layer and of the modules within, but for BatchNorm.
    """
    return fuses_layers(x) and _is_plain(module, own_types)


def _without_autograd(function: Callable) -> Callable:
    """A function whose ops skip autograd's part of PyTorch's dispatcher, a tenth of the time of a 32x32 image."""

    @wraps(function)
    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return function(module, x)

    return run


@_without_autograd
def block(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`SpatialMambaBlock`'s output for (batch, channels, height, width)."""
    mixer, mlp, native = module.mixer, module.mlp, torch.ops.mmspatialmamba_native
    x = native.depthwise_conv(x, module.cpe1.weight, module.cpe1.bias, 'residual').permute(0, 2, 3, 1)
    into_scan, into_gate = mixer.in_proj.weight.chunk(2)
    u = norm_linear(x, module.ln1, into_scan).permute(0, 3, 1, 2)
    u = native.depthwise_conv(u, mixer.conv.weight, mixer.conv.bias, 'silu')
    projected = native.linear(u.permute(0, 2, 3, 1), mixer.x_proj.weight, None)
    dt, B, C = projected.split([mixer.dt_rank, 1, 1], dim=-1)
    y = mixer.scan(u, native.linear(dt, mixer.dt_proj.weight, None), B, C)
    x = gated_output(y, x, module.ln1, into_gate, mixer.out_norm, mixer.out_proj.weight).permute(0, 3, 1, 2)
    x = native.depthwise_conv(x, module.cpe2.weight, module.cpe2.bias, 'residual').permute(0, 2, 3, 1)
    x = norm_mlp(x, module.ln2, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return x.permute(0, 3, 1, 2)


def _folded(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a ConvLayer's convolution that also does its BatchNorm's work."""
    weight, bias = layer.conv.weight, layer.conv.bias
    if not hasattr(layer, 'norm'):
        return weight, bias
    norm = layer.norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    return weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def _conv(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A ConvLayer's output for (batch, channels, height, width)."""
    weight, bias = _folded(layer)
    if weight.shape[2:] == (1, 1):
        x = linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    else:
        x = F.conv2d(x, weight, bias, layer.conv.stride, layer.conv.padding)
    return x.relu_() if hasattr(layer, 'act') else x


@_without_autograd
def stem(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Stem`'s output for (batch, in_channels, height, width)."""
    x = _conv(module.conv1, x)
    x = _conv(module.conv2[1], _conv(module.conv2[0], x)).add_(x)
    return _conv(module.conv3[1], _conv(module.conv3[0], x))


@_without_autograd
def downsample(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Downsample`'s output for (batch, channels, height, width)."""
    parameters = [tensor.flatten(1) if tensor.dim() > 1 else tensor for layer in module for tensor in _folded(layer)]
    return inference.downsample(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)
