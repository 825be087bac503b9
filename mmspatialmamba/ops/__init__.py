"""The ops of Spatial-Mamba. They need torch, and nothing else."""

from . import flops
from .backend import available_backends, use_backend
from .biased_gelu import biased_gelu
from .depthwise_conv import depthwise_conv
from .gated_layer_norm import gated_layer_norm
from .linear import linear
from .selective_scan import selective_scan
from .state_fusion import state_fusion
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

flops.install()

__all__ = [
    'available_backends',
    'biased_gelu',
    'depthwise_conv',
    'gated_layer_norm',
    'linear',
    'selective_scan',
    'state_fusion',
    'structure_aware_scan',
    'structure_aware_scan_backward',
    'use_backend',
]
