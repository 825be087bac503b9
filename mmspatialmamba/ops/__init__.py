"""The ops of Spatial-Mamba. They need torch, and nothing else."""

from .backend import available_backends, use_backend
from .selective_scan import selective_scan
from .state_fusion import state_fusion
from .structure_aware_scan import structure_aware_scan

__all__ = [
    'available_backends',
    'selective_scan',
    'state_fusion',
    'structure_aware_scan',
    'use_backend',
]
