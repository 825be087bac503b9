"""The ops of Spatial-Mamba. They need torch, and nothing else.

The name of an op is its function here. What else its folder holds is imported by its full name:
``from mmspatialmamba.ops.state_fusion.taps import TAPS``.
"""

from . import flops
from .depthwise_conv import depthwise_conv
from .dispatch import available_backends, use_backend
from .gated_layer_norm import gated_layer_norm
from .selective_scan import selective_scan
from .state_fusion import state_fusion
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

flops.register_with_torch()

__all__ = [
    'available_backends',
    'depthwise_conv',
    'gated_layer_norm',
    'selective_scan',
    'state_fusion',
    'structure_aware_scan',
    'structure_aware_scan_backward',
    'use_backend',
]
