"""The mmspatialmamba scope of mmengine's registries.

mmdet, mmseg and mmpretrain search their own registry, then mmengine's root. Each of them therefore finds a model of the
root by its bare name. This scope gives it the name ``mmspatialmamba.NAME``, which needs no ``custom_imports``.
"""

from __future__ import annotations

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

SCOPE = 'mmspatialmamba'
MODELS = Registry('model', parent=ROOT_MODELS, scope=SCOPE, locations=['mmspatialmamba.models'])


def register_model(cls: type) -> type:
    """Register a model by its class name, in this scope and in mmengine's root registry."""
    ROOT_MODELS.register_module(module=cls)
    MODELS.register_module(module=cls)
    return cls


def type_name(kind: str | type | None) -> str:
    """Name of the class that a config's ``type`` is or names, maybe with a scope or a module before it."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]
