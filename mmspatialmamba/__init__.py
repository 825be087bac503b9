from importlib.util import find_spec

from .version import __version__

if find_spec('mmengine') is not None:
    from mmengine.config.utils import MODULE2PACKAGE

    from . import engine, models  # noqa: F401
    from .checkpoint import allow_training_checkpoints

    # mmengine resolves `_base_ = 'mmspatialmamba::...'` only for the packages in this table.
    MODULE2PACKAGE.setdefault('mmspatialmamba', 'mmspatialmamba')
    allow_training_checkpoints()

__all__ = ['__version__']
