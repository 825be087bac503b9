from .block import SpatialMambaBlock
from .conv import Downsample, Stem
from .mixer import StructureAwareSSM

__all__ = ['Downsample', 'SpatialMambaBlock', 'Stem', 'StructureAwareSSM']
