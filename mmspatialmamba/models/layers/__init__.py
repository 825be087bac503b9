from .block import MLP, SpatialMambaBlock
from .conv import ConvLayer, LayerNorm2d, PointwiseConv
from .downsample import Downsample
from .flops import THOP_OPS
from .mixer import StructureAwareSSM
from .stem import Stem

__all__ = [
    'THOP_OPS',
    'MLP',
    'ConvLayer',
    'Downsample',
    'LayerNorm2d',
    'PointwiseConv',
    'SpatialMambaBlock',
    'Stem',
    'StructureAwareSSM',
]
