from .block import SpatialMambaBlock
from .downsample import Downsample
from .mixer import StructureAwareSSM
from .stem import Stem

__all__ = ['Downsample', 'SpatialMambaBlock', 'Stem', 'StructureAwareSSM']
