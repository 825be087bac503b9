"""The mmspatialmamba scope of mmengine's registries.

mmdet, mmseg and mmpretrain search their own registry, then mmengine's root. A model registered in the root is therefore
found by its bare name from each of them, and through this scope as ``mmspatialmamba.NAME`` without ``custom_imports``.
"""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

SCOPE = 'mmspatialmamba'
MODELS = Registry('model', parent=ROOT_MODELS, scope=SCOPE, locations=['mmspatialmamba.models'])


def register_model(cls: type) -> type:
    """Class decorator: register a model under its name in this scope and in mmengine's root registry."""
    ROOT_MODELS.register_module(module=cls)
    MODELS.register_module(module=cls)
    return cls
