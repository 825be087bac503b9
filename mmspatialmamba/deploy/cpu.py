"""Copies of models for inference on a CPU, on the ops that PyTorch's inductor uses: oneDNN's with packed weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import PointwiseConv
from mmspatialmamba.ops import depthwise_conv, gated_layer_norm, structure_aware_scan

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class _Prepared(nn.Module):
    """Base of prepared layers, which hold no parameters: they refuse to be trained, saved or copied."""

    def train(self, mode: bool = True) -> _Prepared:
        if mode:
            raise RuntimeError('a model prepared for CPU inference cannot be trained: train the original')
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('a model prepared for CPU inference holds no weights to save: save the original')

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError('a model prepared for CPU inference cannot be copied or pickled: prepare the original again')


class _Linear(_Prepared):
    """Linear layer with packed weight, and an activation or the addition of a residual as epilogue.

    It needs ``torch.ops.mkldnn``'s private ops, which PyTorch's inductor uses (tried on torch 2.14).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = 'none') -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias, self.activation = bias, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in_features) to (..., out_features), the shape of ``residual``."""
        linear = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return linear.binary(x, residual, self.weight, self.bias, 'add')
        return linear.default(x, self.weight, self.bias, self.activation, [], 'none')


class _Pointwise(_Linear):
    """1x1 convolution of a channels-last map as a packed linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Conv(_Prepared):
    """Convolution with packed weight, and ReLU or the addition of a residual as epilogue (see :class:`_Linear`)."""

    def __init__(self, conv: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self.geometry)
        self.bias, self.activation = conv.bias, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, ...), the shape of ``residual``."""
        convolve, common = torch.ops.mkldnn._convolution_pointwise, (self.weight, self.bias, *self.geometry)
        if residual is not None:
            return convolve.binary(x, residual, *common, 'add', None, None, [], None)
        return convolve.default(x, *common, self.activation, [], None)


def _prepare_conv_layer(layer: Any) -> nn.Module:
    """Fold BatchNorm into the preceding convolution, and pack it with the ReLU that follows."""
    conv, activation = layer.conv, 'relu' if hasattr(layer, 'act') else 'none'
    if hasattr(layer, 'norm'):
        conv = fuse_conv_bn_eval(conv, layer.norm)
    if isinstance(conv, PointwiseConv):
        return _Pointwise(conv.weight.flatten(1), conv.bias, activation)
    return _Conv(conv, activation)


class _Stem(_Prepared):
    def __init__(self, stem: Any) -> None:
        super().__init__()
        self.conv1 = _prepare_conv_layer(stem.conv1)
        self.conv2 = nn.ModuleList(map(_prepare_conv_layer, stem.conv2))
        self.conv3 = nn.Sequential(*map(_prepare_conv_layer, stem.conv3))
        self.dtype = stem.conv1.conv.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, H, W) to (batch, embed_dims, ceil(H / 4), ceil(W / 4))."""
        if (x.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError('a model prepared for CPU inference has no gradients: use the original')
        x = self.conv1(x.to(self.dtype))
        first, second = self.conv2
        return self.conv3(second(first(x), x))


class _Block(_Prepared):
    def __init__(self, block: Any) -> None:
        super().__init__()
        mixer, mlp = block.mixer, block.mlp
        self.cpe1, self.cpe2, self.conv = block.cpe1, block.cpe2, mixer.conv
        self.ln1, self.ln2, self.out_norm = mixer.ln, mlp.ln, mixer.out_norm
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = (
            _Linear(layer.weight) for layer in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
        )
        self.fc1 = _Linear(mlp.fc1.weight, mlp.fc1.bias, 'gelu')
        self.fc2 = _Linear(mlp.fc2.weight, mlp.fc2.bias)
        self.dt_rank = mixer.dt_rank
        self.A = -torch.exp(mixer.A_log.float())
        self.parameters_of_scan = mixer.D, tuple(mixer.fusion_kernels), mixer.fusion_alpha, mixer.dt_bias

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        u, z = self.in_proj(self.ln1(x)).chunk(2, dim=-1)
        u = depthwise_conv(u.permute(0, 3, 1, 2), self.conv.weight, self.conv.bias, 'silu')
        dt, B, C = self.x_proj(u.permute(0, 2, 3, 1)).split([self.dt_rank, 1, 1], dim=-1)
        delta, B, C = (t.permute(0, 3, 1, 2) for t in (self.dt_proj(dt), B, C))
        y = structure_aware_scan(u, delta, self.A, B, C, *self.parameters_of_scan).permute(0, 2, 3, 1)
        norm = self.out_norm
        return self.out_proj(gated_layer_norm(y, z, norm.weight, norm.bias, norm.eps), x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same."""
        x = depthwise_conv(x, self.cpe1.weight, self.cpe1.bias, 'residual')
        x = self._mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = depthwise_conv(x, self.cpe2.weight, self.cpe2.bias, 'residual').permute(0, 2, 3, 1)
        return self.fc2(self.fc1(self.ln2(x)), x).permute(0, 3, 1, 2)


def _check_processor(dtype: torch.dtype) -> None:
    """Raise RuntimeError unless torch has the packed ops, and oneDNN computes in ``dtype`` on this processor."""
    names = ('_linear_pointwise', '_convolution_pointwise', '_reorder_linear_weight', '_reorder_convolution_weight')
    missing = [name for name in names if not hasattr(torch.ops.mkldnn, name)]
    if missing or not torch.backends.mkldnn.is_available():
        raise RuntimeError(
            f'prepare_for_cpu needs a torch with oneDNN and its packed ops, but torch {torch.__version__} lacks '
            f'{", ".join(missing) or "oneDNN"}: use the model as it is'
        )
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError('prepare_for_cpu: this processor has no bfloat16 instructions: prepare a float32 model')


def _describe(module: nn.Module | None) -> str:
    # A ParameterList lists its tensors, whose dtype is checked elsewhere.
    arguments = '' if module is None or isinstance(module, nn.ParameterList) else module.extra_repr()
    return 'nothing' if module is None else f'{type(module).__name__}({arguments})'


def _layers(backbone: SpatialMamba, name: str) -> dict[str, nn.Module]:
    """List the modules that a prepared copy replaces."""
    layers = {f'{name}.{part}'.lstrip('.'): backbone.get_submodule(part) for part in ('stem', 'stages', 'downsamples')}
    return {path: module for prefix, layer in layers.items() for path, module in layer.named_modules(prefix=prefix)}


def _check_layers(backbone: SpatialMamba, name: str) -> None:
    """Raise ValueError unless a backbone's layers are as they were built."""
    # Imported late: mmcv.cnn loads mmcv._ext, which importing this package must not need.
    from mmcv.cnn.bricks import DropPath

    with torch.device('meta'):
        arch = dict(embed_dims=backbone.out_channels[0], depths=backbone.depths)
        built = SpatialMamba(arch, backbone.in_channels, backbone.out_indices)
    modules, expected = _layers(backbone, name), _layers(built, name)
    for path in {**expected, **modules}:
        module, twin, what = modules.get(path), expected.get(path), None
        if isinstance(module, _BatchNorm) and isinstance(twin, _BatchNorm):
            if module.running_mean is None or module.running_var is None:
                what = f'is {_describe(module)} without running statistics'
        elif isinstance(module, (DropPath, nn.Identity)) and isinstance(twin, DropPath):
            pass
        elif type(module) is not type(twin) or _describe(module) != _describe(twin):
            what = f'is {_describe(module)}, not {_describe(twin)}'
        if module is not None and ('forward' in vars(module) or any(getattr(module, hook) for hook in _HOOKS)):
            what = 'has hooks or a forward of its own'
        if what:
            raise ValueError(
                f'prepare_for_cpu: {path} {what}, which a prepared copy would lose: undo or merge that first, '
                'or use the model as it is'
            )


def _check_tensors(backbone: SpatialMamba, name: str) -> torch.dtype:
    """Raise ValueError unless a backbone is on the CPU, in one dtype; return the dtype."""
    tensors = [*backbone.named_parameters(prefix=name), *backbone.named_buffers(prefix=name)]
    dtype = tensors[0][1].dtype
    for path, tensor in tensors:
        if tensor.device.type != 'cpu':
            raise ValueError(f'prepare_for_cpu: {path} is on {tensor.device}: move the model with .cpu() first')
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise ValueError(f'prepare_for_cpu: {path} is a {type(tensor).__name__}, not a plain tensor')
        if tensor.is_floating_point() and (tensor.dtype != dtype or dtype not in (torch.float32, torch.bfloat16)):
            raise ValueError(
                f'prepare_for_cpu: {path} is {tensor.dtype}: the whole backbone must be float32, or bfloat16'
            )
    return dtype


def _prepare_backbone(backbone: Any) -> None:
    """Replace a backbone's layers by prepared ones."""
    backbone.requires_grad_(False)
    backbone.stem = _Stem(backbone.stem)
    backbone.stages = nn.ModuleList(nn.Sequential(*map(_Block, stage)) for stage in backbone.stages)
    backbone.downsamples = nn.ModuleList(nn.Sequential(*map(_prepare_conv_layer, d)) for d in backbone.downsamples)
    backbone.eval()


@torch.no_grad()
def prepare_for_cpu(model: nn.Module) -> nn.Module:
    """Copy a model for inference on a CPU: fold BatchNorm, pack weights, fuse activations and residuals into GEMMs.

    The copy's backbones compute what the model's do, but for rounding, and faster (docs/cpu.md). Everything else, heads
    and necks, is copied as it is. The model itself is not touched. The copy has no gradients, and cannot be trained,
    saved or copied: prepare it again from the model. It converts images to its dtype.

    Args:
        model (nn.Module): A :class:`SpatialMamba`, or a classifier, detector or segmentor with one, in evaluation mode
            on the CPU, in float32 or bfloat16 (``model.to(torch.bfloat16)``).

    Returns:
        nn.Module: The copy.

    Raises:
        RuntimeError: If torch lacks oneDNN's packed ops, or the processor instructions for bfloat16.
        ValueError: If the model is in training mode, holds no :class:`SpatialMamba`, or a module of a backbone is on
            another device, in another dtype or not as it was built: hooked, parametrized, wrapped, replaced.
    """
    if is_model_wrapper(model):
        raise ValueError(f'prepare_for_cpu: {type(model).__name__} wraps the model: pass its .module')
    names = [name for name, module in model.named_modules() if isinstance(module, SpatialMamba)]
    if not names:
        raise ValueError(f'prepare_for_cpu: {type(model).__name__} holds no SpatialMamba backbone')
    for name in names:
        backbone: Any = model.get_submodule(name)
        _check_layers(backbone, name)
        dtype = _check_tensors(backbone, name)
        training = next((path for path, module in backbone.named_modules(prefix=name) if module.training), None)
        if training is not None:
            raise ValueError(
                f'prepare_for_cpu: {training or "the backbone"} is in training mode: call model.eval() first'
            )
        _check_processor(dtype)
    prepared = copy.deepcopy(model)
    for name in names:
        _prepare_backbone(prepared.get_submodule(name))
    return prepared
