"""What the layers compute where no gradients are needed, in as few ops as there are.

A layer is computed this way if it is as it was built: in evaluation mode, all its modules of their own types, without
hooks, all its parameters in float32. Else, say with LoRA's modules within or with a hook that collects features, each
module is called. Where products in bfloat16 are fast, blocks are computed so in that dtype too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmspatialmamba.ops.backend import fuses_elementwise, has_products

from .precision import is_fast


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


def _is_plain(module: nn.Module, own_types: tuple[type, ...], dtype: torch.dtype = torch.float32) -> bool:
    """Whether a module is as it was built, see above, with parameters of a dtype."""
    for m in module.modules():
        foldable = isinstance(m, _BatchNorm) and m.track_running_stats and m.affine
        if m.training or not is_untouched(m, (type(m),) if foldable else own_types):
            return False
        if any(p is not None and p.dtype != dtype for p in m._parameters.values()):
            return False
    return True


def can_fuse(module: nn.Module, x: torch.Tensor, own_types: tuple[type, ...]) -> bool:
    """Whether to compute a layer by this module's functions.

    Args:
        module (nn.Module): The layer.
        x (Tensor): Its input.
        own_types (tuple[type]): Types of the layer and of the modules within, but for BatchNorm.
    """
    return not torch.is_grad_enabled() and has_products(x) and _is_plain(module, own_types)


def has_geometry(convs: Iterable[nn.Conv2d], strides: tuple[int, ...]) -> bool:
    """Whether 3x3 convolutions have these strides, a padding of 1 and no dilation, as the ops take them to have.

    Args:
        convs (Iterable[nn.Conv2d]): The convolutions.
        strides (tuple[int]): Their strides.
    """
    return all(
        (conv.stride, conv.padding, conv.dilation) == ((stride, stride), (1, 1), (1, 1))
        for conv, stride in zip(convs, strides)
    )


def can_fuse_block(module: nn.Module, x: torch.Tensor, own_types: tuple[type, ...]) -> bool:
    """Whether to compute a block by :func:`block` in bfloat16: under autocast, or with such weights.

    Args:
        module (nn.Module): The block.
        x (Tensor): Its input.
        own_types (tuple[type]): Types of the block and of the modules within.
    """
    if x.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return False
    autocast = torch.is_autocast_enabled('cpu')
    if (autocast and torch.get_autocast_dtype('cpu') != x.dtype) or not (x.numel() and is_fast(x.dtype)):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not fuses_elementwise(x):
        return False
    return _is_plain(module, own_types, torch.float32 if autocast else x.dtype)


def _without_autograd(function: Callable) -> Callable:
    """A function whose ops skip autograd's part of PyTorch's dispatcher, a tenth of the time of a 32x32 image."""

    @wraps(function)
    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return function(module, x)

    return run


def _folded(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a ConvLayer's convolution that also does its BatchNorm's work."""
    weight, bias = layer.conv.weight, layer.conv.bias
    if not hasattr(layer, 'norm'):
        return weight, weight.new_zeros(len(weight)) if bias is None else bias
    norm = layer.norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    return weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


@_without_autograd
def stem(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Stem`'s output for (batch, in_channels, height, width)."""
    *layers, last = module.conv1, *module.conv2, *module.conv3
    weight, bias = _folded(last)
    parameters = [tensor for layer in layers for tensor in _folded(layer)]
    x = torch.ops.mmspatialmamba_native.stem(x.permute(0, 2, 3, 1), *parameters, weight.flatten(1), bias)
    return x.permute(0, 3, 1, 2)


@_without_autograd
def downsample(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Downsample`'s output for (batch, channels, height, width)."""
    parameters = [tensor.flatten(1) if tensor.dim() > 1 else tensor for layer in module for tensor in _folded(layer)]
    return torch.ops.mmspatialmamba_native.downsample(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)


@_without_autograd
def block(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`SpatialMambaBlock`'s output for (batch, channels, height, width)."""
    cpe1, ln1, mixer, cpe2, ln2, mlp = module.cpe1, module.ln1, module.mixer, module.cpe2, module.ln2, module.mlp
    conv, out_norm, fc1, fc2 = mixer.conv, mixer.out_norm, mlp.fc1, mlp.fc2
    return torch.ops.mmspatialmamba_native.block(
        x,
        *(cpe1.weight, cpe1.bias, ln1.weight, ln1.bias, ln1.eps),
        *(mixer.in_proj.weight, conv.weight, conv.bias, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_bias),
        *(mixer.A_log, mixer.D, *mixer.fusion_kernels, mixer.fusion_alpha),
        *(out_norm.weight, out_norm.bias, out_norm.eps, mixer.out_proj.weight),
        *(cpe2.weight, cpe2.bias, ln2.weight, ln2.bias, ln2.eps),
        *(fc1.weight, fc1.bias, fc2.weight, fc2.bias),
    )
