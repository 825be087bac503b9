"""What the layers compute where no gradients are needed, in as few ops as there are.

A layer is computed this way if it is as it was built: in evaluation mode, all its modules of their own types, without
hooks, all its parameters in float32, or in bfloat16. Else, say with LoRA's modules within or with a hook that collects
features, each module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmspatialmamba.ops.backend import fuses_layers


def _is_own(module: nn.Module, own_types: tuple[type, ...]) -> bool:
    """Whether a module is of one of its own types and has no hooks of its own."""
    return type(module) in own_types and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_untouched(module: nn.Module, own_types: tuple[type, ...]) -> bool:
    """Whether a module is of one of its own types and nobody has hooks on it, so that calling it can be left out.

    Args:
        module (nn.Module): The module, without what it contains.
        own_types (tuple[type]): Its types.
    """
    return _is_own(module, own_types) and not nn.modules.module._has_any_global_hook()


def _is_plain(module: nn.Module, own_types: tuple[type, ...], dtype: torch.dtype) -> bool:
    """Whether a module is as it was built, see above, with parameters of a dtype."""
    if nn.modules.module._has_any_global_hook():
        return False
    for m in module.modules():
        foldable = isinstance(m, _BatchNorm) and m.track_running_stats and m.affine
        if m.training or not _is_own(m, (type(m),) if foldable else own_types):
            return False
        for parameter in m._parameters.values():
            if parameter is not None and parameter.dtype != dtype:
                return False
    return True


def _dtypes(x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a layer's activations and of the parameters that belong to them."""
    if torch.is_autocast_enabled('cpu') and x.dtype in (torch.float32, torch.bfloat16):
        return torch.get_autocast_dtype('cpu'), torch.float32
    return x.dtype, x.dtype


def can_fuse(module: nn.Module, x: torch.Tensor, own_types: tuple[type, ...], casts: bool = True) -> bool:
    """Whether to compute a layer by this module's functions, in float32 or bfloat16.

    Args:
        module (nn.Module): The layer.
        x (Tensor): Its input.
        own_types (tuple[type]): Types of the layer and of the modules within, but for BatchNorm.
        casts (bool): Whether the output has autocast's dtype also where x has another. Defaults to True.
    """
    if torch.is_grad_enabled():
        return False
    dtype, parameters = _dtypes(x)
    if dtype not in (torch.float32, torch.bfloat16) or not (casts or dtype == x.dtype):
        return False
    return fuses_layers(x) and _is_plain(module, own_types, parameters)


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


def _without_autograd(function: Callable) -> Callable:
    """A function whose ops skip autograd's part of PyTorch's dispatcher, a tenth of the time of a 32x32 image."""

    @wraps(function)
    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return function(module, x)

    return run


def _folded(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a ConvLayer's convolution that also does its BatchNorm's work, computed in float32."""
    weight, bias = layer.conv.weight, layer.conv.bias
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if not hasattr(layer, 'norm'):
        return weight, bias
    norm = layer.norm
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    # Products of two dtypes take PyTorch several times as long as a conversion.
    return weight.float() * scale.view(-1, 1, 1, 1), norm.bias + (bias - norm.running_mean) * scale


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(batch, height, width, channels) of a (batch, channels, height, width) input, in its layer's dtype."""
    return x.to(_dtypes(x)[0]).permute(0, 2, 3, 1)


@_without_autograd
def stem(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Stem`'s output for (batch, in_channels, height, width)."""
    *layers, last = module.conv1, *module.conv2, *module.conv3
    weight, bias = _folded(last)
    parameters = [tensor for layer in layers for tensor in _folded(layer)]
    x = torch.ops.mmspatialmamba_native.stem(_pixels(x), *parameters, weight.flatten(1), bias)
    return x.permute(0, 3, 1, 2)


@_without_autograd
def downsample(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Downsample`'s output for (batch, channels, height, width)."""
    parameters = [tensor.flatten(1) if tensor.dim() > 1 else tensor for layer in module for tensor in _folded(layer)]
    return torch.ops.mmspatialmamba_native.downsample(_pixels(x), *parameters).permute(0, 3, 1, 2)


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
