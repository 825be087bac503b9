from .block import MLP, SpatialMambaBlock
from .conv import ConvLayer, PointwiseConv
from .downsample import Downsample
from .mixer import StructureAwareSSM
from .stem import Stem

__all__ = ['MLP', 'ConvLayer', 'Downsample', 'PointwiseConv', 'SpatialMambaBlock', 'Stem', 'StructureAwareSSM']
