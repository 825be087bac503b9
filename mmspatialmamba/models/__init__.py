from .backbones import MM_SpatialMamba, SpatialMamba

__all__ = ['MM_SpatialMamba', 'SpatialMamba']
