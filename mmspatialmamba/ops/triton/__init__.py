"""The ops as Triton kernels, forward and backward.

They need torch, the pip package ``triton`` (3.6 or later) and inputs on a CUDA device; no compiler. Where
``TRITON_INTERPRET=1`` is in the environment before triton is first imported, Triton's interpreter runs them on CPU
tensors instead: slowly, for tests.

The functions take plain tensors whose shapes the caller checked, and return fresh ones; they know nothing of autograd.
float64 is not for them: they compute in float32.
"""

from .selective_scan import selective_scan, selective_scan_backward
from .state_fusion import state_fusion, state_fusion_backward
from .structure_aware_scan import structure_aware_scan, structure_aware_scan_backward

__all__ = [
    'selective_scan',
    'selective_scan_backward',
    'state_fusion',
    'state_fusion_backward',
    'structure_aware_scan',
    'structure_aware_scan_backward',
]
