"""The ops' multiply-adds, for the tools that count: torch.utils.flop_counter, mmengine's analysis and fvcore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod

import torch

from .. import compat

# Multiply-adds for each element of the state h, or of a convolution's output. A fusion counts three kernels of nine
# taps, as three depthwise convolutions do, though a backend may merge the three centres; the fused op's read-out is
# C * g + D * u.
_SCAN, _FUSION, _READ_OUT, _CONV = 7, 3 * 9, 2, 9
FORWARD = {
    'selective_scan': _SCAN,
    'state_fusion': _FUSION,
    'structure_aware_scan': _SCAN + _FUSION + _READ_OUT,
    'depthwise_conv': _CONV,
}
# Each product has two gradients, so a backward pass is twice a forward one. Where h is not kept, it and its fusion are
# computed again first.
BACKWARD = {
    'selective_scan_backward': 2 * _SCAN,
    'state_fusion_backward': 2 * _FUSION,
    'structure_aware_scan_backward': _SCAN + _FUSION + 2 * (_SCAN + _FUSION + _READ_OUT),
    'depthwise_conv_backward': 2 * _CONV,
}
# Counted by mmengine and fvcore, not by torch.utils.flop_counter, as PyTorch's LayerNorm is.
NORM = {'gated_layer_norm': 5}
# What a backend fuses is counted under the name of what another leaves to PyTorch.
_TRACED_AS = {'depthwise_conv': 'conv', 'gated_layer_norm': 'layer_norm'}
_BACKENDS = ('torch', 'triton', 'native')


def multiply_adds(op: str, *shape: int) -> int:
    """Count the multiply-adds of one call as fvcore and mmengine do.

    Args:
        op (str): A key of ``FORWARD``, ``BACKWARD`` or ``NORM``.
        *shape (int): Sizes of the state h: (batch, dim, state, length) of a scan, (batch, dim, height, width) of a
            fusion or of the fused op. Of the other ops, those of the output.

    Returns:
        int: Their number. ``torch.utils.flop_counter`` counts a multiply-add as two operations, so twice as many there.
    """
    return {**FORWARD, **BACKWARD, **NORM}[op] * prod(shape)


def _torch_formula(op: str) -> Callable[..., int]:
    def count(*shapes, out_shape, **kwargs):
        return 2 * multiply_adds(op, *(shapes[0] if op in BACKWARD else out_shape))

    return count


def register_with_torch() -> None:
    """Register the formulas with ``torch.utils.flop_counter``, once; importing ``mmspatialmamba.ops`` does it."""
    for namespace in (getattr(torch.ops, f'mmspatialmamba_{backend}') for backend in _BACKENDS):
        for op in (*FORWARD, *BACKWARD):
            if hasattr(namespace, op):
                compat.register_flop_formula(getattr(namespace, op), _torch_formula(op))


def _jit_handle(op: str) -> Callable:
    def count(inputs, outputs):
        return Counter({_TRACED_AS.get(op, op): multiply_adds(op, *outputs[0].type().sizes())})

    return count


# Handles for the ops' names in a graph traced by torch.jit. mmengine's FlopAnalyzer and fvcore's FlopCountAnalysis take
# them by their ``set_op_handle(**JIT_HANDLES)``.
JIT_HANDLES = {f'mmspatialmamba_{backend}::{op}': _jit_handle(op) for backend in _BACKENDS for op in (*FORWARD, *NORM)}


def register_with_mmengine() -> None:
    """Add the formulas to those that every new analyzer of mmengine has, such as get_model_complexity_info's.

    That function, by which the get_flops.py of mmpretrain, mmdet and mmsegmentation count, takes no handles. mmengine
    has no public way to its default ones (mmengine 0.10).
    """
    from mmengine.analysis import complexity_analysis

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(JIT_HANDLES)
