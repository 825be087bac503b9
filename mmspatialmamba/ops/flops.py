"""What the ops cost, told to the tools that count: torch.utils.flop_counter, mmengine's analysis and fvcore."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from math import prod
from types import ModuleType

import torch

# Multiply-adds for each element of the state h, or of a convolution's output. A fusion counts three kernels of nine
# taps, as three depthwise convolutions do, though a backend may merge the three centres; the fused op's read-out is
# C * g + D * u.
_SCAN, _FUSION, _READ_OUT, _CONV = 7, 3 * 9, 2, 9
FORWARD = {
    'selective_scan': _SCAN,
    'state_fusion': _FUSION,
    'structure_aware_scan': _SCAN + _FUSION + _READ_OUT,
    'depthwise_conv': _CONV,
    'downsampling_conv': _CONV,
}
# Each product has two gradients, so a backward pass is twice a forward one. Where h is not kept, it and its fusion are
# computed again first.
BACKWARD = {
    'selective_scan_backward': 2 * _SCAN,
    'state_fusion_backward': 2 * _FUSION,
    'structure_aware_scan_backward': _SCAN + _FUSION + 2 * (_SCAN + _FUSION + _READ_OUT),
    'depthwise_conv_backward': 2 * _CONV,
    'downsampling_conv_backward': 2 * _CONV,
}
# Counted by mmengine and fvcore, not by torch.utils.flop_counter, as PyTorch's LayerNorm is.
NORM = {'gated_layer_norm': 5}
# Of products: which arguments meet each output row. These are the weights, and the input in a weight's gradient.
_FACTORS = {
    'linear': (1,),
    'linear_weight_gradient': (1,),
    'gelu_linear': (2,),
    'gelu_linear_backward': (3, 3),
}
# What a backend fuses is counted under the name of what another leaves to PyTorch.
_TRACED_AS = {'depthwise_conv': 'conv', 'downsampling_conv': 'conv', 'gated_layer_norm': 'layer_norm'}
_NAMESPACES = [f'mmspatialmamba_{backend}' for backend in ('torch', 'triton', 'native')]


def multiply_adds(op: str, *shape: int) -> int:
    """Multiply-adds of one call, as fvcore and mmengine count them.

    Args:
        op (str): A key of ``FORWARD``, ``BACKWARD`` or ``NORM``.
        *shape (int): Sizes of the state h: (batch, dim, state, length) of a scan, (batch, dim, height, width) of a
            fusion or of the fused op. Of the other ops, those of the output.

    Returns:
        int: Their number. ``torch.utils.flop_counter`` counts a multiply-add as two operations, so twice as many there.

    Examples:
        >>> from mmspatialmamba.ops.flops import multiply_adds
        >>> multiply_adds('structure_aware_scan', 1, 128, 56, 56)
        14450688
    """
    return {**FORWARD, **BACKWARD, **NORM}[op] * prod(shape)


def _hook_torch(module: ModuleType) -> None:
    """Register the formulas of every loaded backend's ops with ``torch.utils.flop_counter``."""

    def formula(op):
        def count(*shapes, out_shape, **kwargs):
            return 2 * multiply_adds(op, *(shapes[0] if op in BACKWARD else out_shape))

        return count

    def layer_formula(op, positions):
        def count(*shapes, out_shape, **kwargs):
            rows = out_shape[0] if op == 'gelu_linear_backward' else out_shape
            return 2 * prod(rows[:-1]) * sum(prod(shapes[position]) for position in positions)

        return count

    for op, positions in _FACTORS.items():
        if hasattr(torch.ops.mmspatialmamba_native, op):
            module.register_flop_formula(getattr(torch.ops.mmspatialmamba_native, op))(layer_formula(op, positions))
    for namespace in (getattr(torch.ops, name) for name in _NAMESPACES):
        for op in (*FORWARD, *BACKWARD):
            if hasattr(namespace, op):
                module.register_flop_formula(getattr(namespace, op))(formula(op))


def _jit_handle(op: str) -> Callable:
    def count(inputs, outputs):
        return Counter({_TRACED_AS.get(op, op): multiply_adds(op, *outputs[0].type().sizes())})

    return count


# Handles for the ops' names in a graph traced by torch.jit, as mmengine's analysers and fvcore's take them.
JIT_HANDLES = {f'{namespace}::{op}': _jit_handle(op) for namespace in _NAMESPACES for op in (*FORWARD, *NORM)}

_HOOKS = {
    'torch.utils.flop_counter': _hook_torch,
    'mmengine.analysis.complexity_analysis': lambda module: module._DEFAULT_SUPPORTED_FLOP_OPS.update(JIT_HANDLES),
    'fvcore.nn.flop_count': lambda module: module._DEFAULT_SUPPORTED_OPS.update(JIT_HANDLES),
}


class _AfterImport(MetaPathFinder):
    """Runs a module's hook when that module has been imported, so that nothing is imported only to be told."""

    def find_spec(self, fullname, path=None, target=None):
        hook = _HOOKS.pop(fullname, None)
        spec = hook and find_spec(fullname)
        if not spec:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Tell each tool the formulas: now if it is imported already, else when it will be."""
    for name in [name for name in _HOOKS if name in sys.modules]:
        _HOOKS.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport())
