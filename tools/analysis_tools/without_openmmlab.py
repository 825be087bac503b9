"""Lets the backbone be built where mmengine and mmcv are not installed, as on a machine that only measures.

SpatialMamba takes its base class, its registry, its logging, DropPath and the builder of norm layers from them. What
stands in for these here computes the same in inference and training; it registers, initialises and logs nothing.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import nn


class BaseModule(nn.Module):
    def __init__(self, init_cfg=None) -> None:
        super().__init__()


class Registry:
    def __init__(self, *args, **kwargs) -> None:
        pass

    def register_module(self, module: type) -> type:
        return module


class DropPath(nn.Module):
    """Drop a sample's residual with a probability, and scale up those kept."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.keep = 1 - drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) < self.keep
        return x * kept / self.keep


def build_norm_layer(cfg: dict, num_features: int) -> tuple[str, nn.Module]:
    if cfg != {'type': 'BN'}:
        raise ValueError(f"norm_cfg {cfg} needs mmcv, which is not installed; without it there is only dict(type='BN')")
    return 'bn', nn.BatchNorm2d(num_features)


def stand_in() -> None:
    """Make ``import mmspatialmamba.models`` work without mmengine and mmcv; call it before that import."""
    names = {
        'mmengine': {},
        'mmengine.logging': {'print_log': lambda *args, **kwargs: None},
        'mmengine.model': {'BaseModule': BaseModule},
        'mmengine.registry': {'Registry': Registry, 'MODELS': Registry()},
        'mmcv': {},
        'mmcv.cnn': {'build_norm_layer': build_norm_layer},
        'mmcv.cnn.bricks': {'DropPath': DropPath},
    }
    # The package decides by mmengine's presence what its import does, so it comes first.
    import mmspatialmamba  # noqa: F401

    for name, members in names.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module
