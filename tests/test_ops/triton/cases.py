"""Inputs and float64 truths for the functions of the Triton backend."""

import os
from importlib import import_module
from types import SimpleNamespace

import torch
from test_ops.truth import dilated_convolutions, relative_error, sequential_scan

SCAN_NAMES = ('u', 'delta', 'A', 'B', 'delta_bias')
FUSION_NAMES = ('h', 'k1', 'k3', 'k5', 'alpha')
FUSED_NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'k1', 'k3', 'k5', 'alpha', 'delta_bias')
MAPS = ('u', 'delta', 'h')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# Errors relative to the largest true value. What is computed in float32 may be rounded once more, to the dtype of the
# result: half a unit of its last place, or a whole one for bfloat16 in the interpreter, which cuts it off.
FLOAT32_BOUND = 5e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}


def triton_ops():
    """The functions that launch the kernels, forward and backward, by name."""
    names = ('selective_scan', 'state_fusion', 'structure_aware_scan')
    modules = {name: import_module(f'mmspatialmamba.ops.{name}.triton') for name in names}
    functions = {name: getattr(module, name) for name, module in modules.items()}
    backward = {f'{name}_backward': getattr(module, f'{name}_backward') for name, module in modules.items()}
    return SimpleNamespace(**functions, **backward)


def make(shapes, dtype=torch.float32, memory_format=torch.contiguous_format, device='cpu'):
    """Normally distributed tensors by name; A is negative. Maps are in ``dtype`` and ``memory_format``."""
    generator = torch.Generator().manual_seed(sum(shapes['delta_bias' if 'delta_bias' in shapes else 'h']))
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name == 'A':
            value = -value.exp()
        if name in ('u', 'delta', 'B', 'C', 'h'):
            value = value.to(dtype)
        if name in MAPS and len(shape) == 4:
            value = value.contiguous(memory_format=memory_format)
        tensors[name] = value.to(device)
    return tensors


def scan_inputs(batch, dim, state, length, dtype=torch.float32, device='cpu'):
    x = (batch, dim, length)
    return make(dict(zip(SCAN_NAMES, (x, x, (dim, state), (batch, state, length), (dim,)))), dtype, device=device)


def fusion_inputs(batch, dim, height, width, dtype=torch.float32, memory_format=torch.contiguous_format, device='cpu'):
    shapes = ((batch, dim, height, width), *[(dim, 1, 3, 3)] * 3, (3,))
    return make(dict(zip(FUSION_NAMES, shapes)), dtype, memory_format, device)


def fused_inputs(batch, dim, height, width, dtype=torch.float32, memory_format=torch.contiguous_format, device='cpu'):
    x, b = (batch, dim, height, width), (batch, 1, height, width)
    shapes = (x, x, (dim, 1), b, b, (dim,), *[(dim, 1, 3, 3)] * 3, (3,), (dim,))
    return make(dict(zip(FUSED_NAMES, shapes)), dtype, memory_format, device)


def scan_truth(u, delta, A, B, delta_bias, delta_softplus):
    return sequential_scan(u, delta, A, B, delta_bias, delta_softplus)


def fusion_truth(h, k1, k3, k5, alpha):
    return dilated_convolutions(h, (k1, k3, k5), alpha)


def fused_truth(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus):
    h = sequential_scan(u.flatten(2), delta.flatten(2), A, B.flatten(2), delta_bias, delta_softplus)
    return C * fusion_truth(h[:, :, 0].view(u.shape), k1, k3, k5, alpha) + D.view(-1, 1, 1) * u


def check_against_truth(forward, backward, truth, inputs, options=(), saves_output=False):
    """Compare a function's output and every gradient with the truth's.

    Args:
        forward, backward (callable): Of the backend; ``backward`` takes the gradient, the output if ``saves_output``,
            and what ``forward`` takes.
        truth (callable): The same as ``forward`` in float64.
        inputs (dict): Tensors by name; None where an optional one is left out.
        options (tuple): What follows them.
        saves_output (bool): Whether ``backward`` needs the output.
    """
    before = {name: None if x is None else x.clone() for name, x in inputs.items()}
    out = forward(*inputs.values(), *options)
    leaves = [None if x is None else x.double().detach().requires_grad_() for x in inputs.values()]
    expected = truth(*leaves, *options)
    assert relative_error(out, expected.detach()) < FLOAT32_BOUND + ROUNDING[out.dtype]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    expected.backward(grad.double())
    grads = backward(grad, *([out] if saves_output else []), *inputs.values(), *options)
    assert len(grads) == len(inputs)
    for (name, x), leaf, value in zip(inputs.items(), leaves, grads):
        if x is None:
            assert value.count_nonzero() == 0, name
            continue
        assert (value.shape, value.dtype) == (x.shape, x.dtype), name
        assert relative_error(value, leaf.grad) < FLOAT32_BOUND + ROUNDING[x.dtype], name
        assert torch.equal(x, before[name]), f'{name} was modified'
    return out, grads
