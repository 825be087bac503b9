from .mm_spatial_mamba import MM_SpatialMamba
from .spatial_mamba import SpatialMamba

__all__ = ['MM_SpatialMamba', 'SpatialMamba']
