from importlib.util import find_spec

# The layers need torch alone.
if find_spec('mmengine') is not None:
    from .backbones import MM_SpatialMamba, SpatialMamba

    __all__ = ['MM_SpatialMamba', 'SpatialMamba']
