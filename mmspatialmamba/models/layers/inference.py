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


def _is_original(module: nn.Module) -> bool:
    """Whether a module has no hooks of its own and its class's ``forward``."""
    # Asked of all modules before each forward pass. By nn.Module's way to look attributes up it takes twice as long.
    own = module.__dict__
    return not (
        own['_forward_hooks']
        or own['_forward_pre_hooks']
        or own['_backward_hooks']
        or own['_backward_pre_hooks']
        or 'forward' in own
        or not hasattr(module, 'forward')  # never; but torch.compile notices by this when one is set later
    )


def is_untouched(module: nn.Module, own_types: tuple[type, ...]) -> bool:
    """Whether a module is of one of its own types and nobody has hooks on it, so that calling it can be left out.

    Args:
        module (nn.Module): The module, without what it contains.
        own_types (tuple[type]): Its types.
    """
    return type(module) in own_types and _is_original(module) and not nn.modules.module._has_any_global_hook()


def _is_foldable(norm: nn.Module) -> bool:
    """Whether a norm is a BatchNorm that a convolution's weights can do the work of."""
    known = _BatchNorm.forward, nn.SyncBatchNorm.forward
    return (
        isinstance(norm, _BatchNorm)
        and norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and type(norm).forward in known
    )


# What a module and those within are, in the order in which they are found: types, or _BatchNorm for all that are, and
# numbers of parameters.
Built = tuple[tuple[type, int], ...]
BUILT_LAYER_NORM: Built = ((nn.LayerNorm, 2),)


def as_built(module: nn.Module, own_types: tuple[type, ...]) -> Built:
    """What :func:`is_plain` compares a module with, taken when it was just built; nothing if it can't be computed here.

    Args:
        module (nn.Module): The module.
        own_types (tuple[type]): Types of it and of the modules within, but for BatchNorm.
    """
    built, modules = [], [module]
    for m in modules:
        if not isinstance(m, _BatchNorm) and type(m) not in own_types:
            return ()
        count = sum(parameter is not None for parameter in m._parameters.values())
        built.append((_BatchNorm if isinstance(m, _BatchNorm) else type(m), count))
        modules += m._modules.values()
    return tuple(built)


def is_plain(module: nn.Module, built: Built, dtype: torch.dtype) -> bool:
    """Whether a module is as it was built, see above, but for global hooks.

    Args:
        module (nn.Module): The module.
        built (Built): What :func:`as_built` said of it.
        dtype (torch.dtype): What its parameters must have.
    """
    modules = [module]
    for m, (kind, count) in zip(modules, built):
        if (_BatchNorm if _is_foldable(m) else type(m)) is not kind or m.training or not _is_original(m):
            return False
        for parameter in m.__dict__['_parameters'].values():
            if parameter is not None:
                count -= 1
                if parameter.dtype is not dtype:
                    return False
        if count:
            return False
        modules += m.__dict__['_modules'].values()
    return len(modules) == len(built)


def _is_transformed() -> bool:
    """Whether this is called within ``torch.vmap`` or another of functorch's transforms: these ops have no rules."""
    # torch.compile cannot trace "is None" of what this returns.
    return not isinstance(torch._C._functorch.peek_interpreter_stack(), type(None))


def _dtypes(x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of a layer's activations and of the parameters that belong to them."""
    if torch.is_autocast_enabled('cpu') and x.dtype in (torch.float32, torch.bfloat16):
        return torch.get_autocast_dtype('cpu'), torch.float32
    return x.dtype, x.dtype


def parameters_dtype(x: torch.Tensor, casts: bool = True) -> torch.dtype | None:
    """The dtype of plain layers' parameters for which to compute them by this module's functions; None if not at all.

    Args:
        x (Tensor): The first layer's input.
        casts (bool): Whether the output has autocast's dtype also where x has another. Defaults to True.
    """
    if torch.is_grad_enabled() or nn.modules.module._has_any_global_hook() or _is_transformed():
        return None
    dtype, parameters = _dtypes(x)
    known = dtype in (torch.float32, torch.bfloat16) and (casts or dtype == x.dtype)
    return parameters if known and fuses_layers(x) else None


def can_fuse(layer: nn.Module, x: torch.Tensor, casts: bool = True) -> bool:
    """Whether to compute a layer, which has a method ``is_plain(dtype)``, by this module's functions.

    Args:
        layer (nn.Module): The layer.
        x (Tensor): Its input.
        casts (bool): See :func:`parameters_dtype`.
    """
    dtype = parameters_dtype(x, casts)
    return dtype is not None and layer.is_plain(dtype)


def has_geometry(convs: Iterable[nn.Conv2d], strides: tuple[int, ...], depthwise: bool = False) -> bool:
    """Whether 3x3 convolutions have these strides, a padding of 1 zero and no dilation, as the ops take them to have.

    Args:
        convs (Iterable[nn.Conv2d]): The convolutions.
        strides (tuple[int]): Their strides.
        depthwise (bool): Whether each channel must be a group of its own, or all one. Defaults to False.
    """
    return all(
        (conv.stride, conv.padding, conv.dilation) == ((stride, stride), (1, 1), (1, 1))
        and conv.padding_mode == 'zeros'
        and conv.groups == (conv.out_channels if depthwise else 1)
        for conv, stride in zip(convs, strides)
    )


def _without_autograd(function: Callable) -> Callable:
    """A function whose ops skip autograd's part of PyTorch's dispatcher, a tenth of the time of a 32x32 image.

    ``torch.compile`` can't trace that, and skips it all.
    """

    @wraps(function)
    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return function(module, x)
        with torch._C._AutoDispatchBelowAutograd():
            return function(module, x)

    return run


def _weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A module's parameters, found several times as fast as by its attributes."""
    parameters = module._parameters
    return parameters['weight'], parameters['bias']


def _conv_layers(layers: Iterable[nn.Module]) -> list:
    """For each ConvLayer its convolution's weight and bias, its BatchNorm's tensors and what that adds to variances."""
    arguments = []
    for layer in layers:
        arguments += _weight_and_bias(layer.conv)
        if 'norm' not in layer._modules:
            arguments += [], 0.0
            continue
        norm = layer.norm
        arguments += [*_weight_and_bias(norm), norm.running_mean, norm.running_var], norm.eps
    return arguments


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(batch, height, width, channels) of a (batch, channels, height, width) input, in its layer's dtype."""
    return x.to(_dtypes(x)[0]).permute(0, 2, 3, 1)


@_without_autograd
def stem(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Stem`'s output for (batch, in_channels, height, width)."""
    layers = _conv_layers((module.conv1, *module.conv2, *module.conv3))
    return torch.ops.mmspatialmamba_native.stem(_pixels(x), *layers).permute(0, 3, 1, 2)


@_without_autograd
def downsample(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`Downsample`'s output for (batch, channels, height, width)."""
    return torch.ops.mmspatialmamba_native.downsample(_pixels(x), *_conv_layers(module)).permute(0, 3, 1, 2)


@_without_autograd
def block(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A :class:`SpatialMambaBlock`'s output for (batch, channels, height, width)."""
    inside = module._modules
    mixer, mlp, ln1, ln2 = inside['mixer'], inside['mlp']._modules, inside['ln1'], inside['ln2']
    parts, own = mixer._modules, mixer._parameters
    in_proj, x_proj, dt_proj, out_proj = (
        parts[name]._parameters['weight'] for name in ('in_proj', 'x_proj', 'dt_proj', 'out_proj')
    )
    return torch.ops.mmspatialmamba_native.block(
        x,
        *(*_weight_and_bias(inside['cpe1']), *_weight_and_bias(ln1), ln1.eps),
        *(in_proj, *_weight_and_bias(parts['conv']), x_proj, dt_proj, own['dt_bias']),
        *(own['A_log'], own['D'], *parts['fusion_kernels']._parameters.values(), own['fusion_alpha']),
        *(*_weight_and_bias(parts['out_norm']), parts['out_norm'].eps, out_proj),
        *(*_weight_and_bias(inside['cpe2']), *_weight_and_bias(ln2), ln2.eps),
        *(*_weight_and_bias(mlp['fc1']), *_weight_and_bias(mlp['fc2'])),
    )


@_without_autograd
def output_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the channels of a (batch, channels, height, width) map, as a contiguous one."""
    return torch.ops.mmspatialmamba_native.layer_norm_planes(x, *_weight_and_bias(norm), norm.eps)


@_without_autograd
def backbone(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A :class:`SpatialMamba`'s outputs for (batch, in_channels, height, width).

    To look once whether its layers can be computed in this way takes a fraction of the time that it takes them all.
    """
    x, outs = stem(module.stem, x), []
    for i in range(module.out_indices[-1] + 1):
        if i > 0:
            x = downsample(module.downsamples[i - 1], x)
        for layer in module.stages[i]:
            x = block(layer, x)
        if i in module.out_indices:
            outs.append(output_norm(getattr(module, f'norm{i}'), x))
    return tuple(outs)
