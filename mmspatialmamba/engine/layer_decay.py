from __future__ import annotations

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Constructor of optimizers with layer-wise learning-rate decay, for models of mmdet, mmseg and mmpretrain.

    A learning rate in a backbone is multiplied by ``layer_decay_rate ** (num_layers - 1 - depth)``. Depth and number of
    layers are those of the backbone's ``get_layer_depth(param_name, prefix)``.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper.
        paramwise_cfg (dict): ``layer_decay_rate`` (float), and any option of
            :class:`mmengine.optim.DefaultOptimWrapperConstructor`.

    Raises:
        ValueError: If ``layer_decay_rate`` is missing, or the model's backbone has no ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if 'layer_decay_rate' not in (paramwise_cfg or {}):
            raise ValueError(f'{type(self).__name__}: paramwise_cfg must have a layer_decay_rate, such as 0.9')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        """Append a group for each parameter of a module to ``params``."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        backbones = {
            f'{name}.': child
            for name, child in module.named_modules()
            if f'.{name}'.endswith('.backbone') and hasattr(child, 'get_layer_depth')
        }
        if not backbones:
            raise ValueError(
                f'{type(self).__name__}: {type(module).__name__} has no backbone with get_layer_depth(); '
                'use a SpatialMamba, or another constructor'
            )
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            name = names[group['params'][0]]
            for start, backbone in backbones.items():
                if name.startswith(start):
                    depth, num_layers = backbone.get_layer_depth(name, start)
                    scale = self.paramwise_cfg['layer_decay_rate'] ** (num_layers - 1 - depth)
                    group['lr'] = group.get('lr', self.base_lr) * scale
