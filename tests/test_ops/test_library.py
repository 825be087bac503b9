"""What torch.library promises of each op: its schema, fake, derivatives and tracing agree with its kernel."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH

pytestmark = [
    pytest.mark.usefixtures('poisoned_memory'),
    pytest.mark.skipif(TORCH < (2, 4), reason='torch.library.opcheck is there since PyTorch 2.4'),
]

BATCH, DIM, STATE, HEIGHT, WIDTH = 2, 3, 2, 4, 5
LENGTH = HEIGHT * WIDTH
KINDS = ('plain', 'no_grad', 'no_bias', 'channels_last', 'slice', 'bfloat16')


def sample_map(kind: str, generator) -> torch.Tensor:
    """A (batch, dim, height, width) map; 'slice' is half of a wider channels-last one, as the mixer's is."""
    wide = torch.randn(BATCH, HEIGHT, WIDTH, 2 * DIM, generator=generator)
    if kind == 'slice':
        return wide.permute(0, 3, 1, 2)[:, :DIM]
    layout = torch.channels_last if kind == 'channels_last' else torch.contiguous_format
    return wide[..., :DIM].permute(0, 3, 1, 2).contiguous(memory_format=layout)


def sample_inputs(op: str, kind: str) -> list:
    """Arguments of an op that is no backward op.

    Args:
        op (str): Name of the op.
        kind (str): One of ``KINDS``.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.bfloat16 if kind == 'bfloat16' else torch.float32
    kernels = [torch.randn(DIM, 1, 3, 3, generator=generator) for _ in range(3)]
    alpha = torch.randn(3, generator=generator)
    bias = None if kind == 'no_bias' else torch.randn(DIM, generator=generator)
    u, delta = (sample_map(kind, generator).to(half) for _ in range(2))
    if op == 'state_fusion':
        inputs = [u, *kernels, alpha]
    elif op == 'structure_aware_scan':
        A = -torch.rand(DIM, 1, generator=generator)
        B, C = (torch.randn(BATCH, 1, HEIGHT, WIDTH, generator=generator).to(half) for _ in range(2))
        D = torch.randn(DIM, generator=generator)
        inputs = [u, delta, A, B, C, D, *kernels, alpha, bias, True]
    else:
        A = -torch.rand(DIM, STATE, generator=generator)
        B = torch.randn(BATCH, STATE, LENGTH, generator=generator).to(half)
        inputs = [u.flatten(2), delta.flatten(2), A, B, bias, True]
    return inputs


# Half of the kinds are slow: each repeats the same checks on another sample.
FORWARD = [pytest.param(k, marks=[] if k in ('no_bias', 'slice') else pytest.mark.slow) for k in KINDS]
BACKWARD = [pytest.param(k, marks=[] if k == 'no_bias' else pytest.mark.slow) for k in KINDS if k != 'plain']


@pytest.mark.parametrize('kind', FORWARD)
@pytest.mark.parametrize('op', ['selective_scan', 'state_fusion', 'structure_aware_scan'])
def test_opcheck(backend, op, kind):
    inputs = sample_inputs(op, kind)
    if kind != 'no_grad':
        inputs = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(getattr(getattr(torch.ops, f'mmspatialmamba_{backend}'), op).default, inputs)


@pytest.mark.parametrize('kind', BACKWARD)
@pytest.mark.parametrize('op', ['selective_scan', 'state_fusion', 'structure_aware_scan'])
def test_opcheck_of_backward(backend, op, kind):
    """No input needs a gradient: torch.compile has no second derivatives, and gradgradcheck tests those of eager."""
    namespace = getattr(torch.ops, f'mmspatialmamba_{backend}')
    inputs = sample_inputs(op, kind)
    output = getattr(namespace, op)(*inputs)
    saved = [output] if op == 'selective_scan' else []
    backward_op = getattr(namespace, f'{op}_backward').default
    torch.library.opcheck(backward_op, [torch.ones_like(output), *saved, *inputs])


def elementwise_inputs(op: str, kind: str) -> list:
    """Arguments of an op that the CPU's compiled backend alone has."""
    generator = torch.Generator().manual_seed(0)
    half = torch.bfloat16 if kind == 'bfloat16' else torch.float32
    maps = [sample_map(kind, generator).to(half) for _ in range(2)]
    if op == 'depthwise_conv':
        weight = torch.randn(DIM, 1, 3, 3, generator=generator)
        return [maps[0], weight, torch.randn(DIM, generator=generator), 'silu' if kind == 'slice' else 'residual']
    norm = (torch.randn(DIM, generator=generator) for _ in range(2))
    return [*(m.permute(0, 2, 3, 1) for m in maps), *norm, 1e-5]


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the ops are not compiled: there was no g++')
@pytest.mark.parametrize('kind', ['plain', 'slice', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('op', ['depthwise_conv', 'gated_layer_norm'])
def test_opcheck_of_elementwise_ops(op, kind):
    namespace = torch.ops.mmspatialmamba_native
    inputs = elementwise_inputs(op, kind)
    output = getattr(namespace, op)(*inputs)
    torch.library.opcheck(getattr(namespace, f'{op}_backward').default, [torch.ones_like(output), *inputs])
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(getattr(namespace, op).default, leaves)


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the ops are not compiled: there was no g++')
@pytest.mark.parametrize('op', ['selective_scan', 'state_fusion', 'structure_aware_scan'])
def test_threads_change_no_bit(op):
    def results(threads):
        torch.set_num_threads(threads)
        leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in sample_inputs(op, 'plain')]
        output = getattr(torch.ops.mmspatialmamba_native, op)(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), [t for t in leaves if isinstance(t, torch.Tensor)])

    before = torch.get_num_threads()
    try:
        alone, shared = results(1), results(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared))


def test_gradients_under_a_dispatch_mode(backend):
    """A kernel may not use torch.func: such a mode, a FLOP counter for instance, switches it off."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    *tensors, softplus = sample_inputs('selective_scan', 'plain')
    leaves = [t.detach().requires_grad_() for t in tensors]
    with Mode():
        ops.selective_scan(*leaves, softplus).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
