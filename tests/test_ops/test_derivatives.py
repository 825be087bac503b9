"""Derivatives of any order, and function transforms."""

import pytest
import torch
from test_ops.truth import relative_error
from torch.autograd import forward_ad

from mmspatialmamba import ops

pytestmark = pytest.mark.usefixtures('poisoned_memory')

BATCH, DIM, HEIGHT, WIDTH = 1, 2, 3, 4
MAP, ONE_CHANNEL, KERNELS = (BATCH, DIM, HEIGHT, WIDTH), (BATCH, 1, HEIGHT, WIDTH), [(DIM, 1, 3, 3)] * 3
SEQUENCE = (BATCH, DIM, HEIGHT * WIDTH)
OPS = {
    'selective_scan': (
        lambda u, delta, A, B, bias: ops.selective_scan(u, delta, -A.exp(), B, bias, True),
        [SEQUENCE, SEQUENCE, (DIM, 2), (BATCH, 2, HEIGHT * WIDTH), (DIM,)],
    ),
    'selective_scan without bias': (
        lambda u, delta, A, B: ops.selective_scan(u, delta.square(), -A.exp(), B),
        [SEQUENCE, SEQUENCE, (DIM, 2), (BATCH, 2, HEIGHT * WIDTH)],
    ),
    'state_fusion': (lambda h, *kernels: ops.state_fusion(h, kernels[:3], kernels[3]), [MAP, *KERNELS, (3,)]),
    'structure_aware_scan': (
        lambda u, delta, A, B, C, D, k1, k3, k5, alpha, bias: ops.structure_aware_scan(
            u, delta, -A.exp(), B, C, D, (k1, k3, k5), alpha, bias
        ),
        [MAP, MAP, (DIM, 1), ONE_CHANNEL, ONE_CHANNEL, (DIM,), *KERNELS, (3,), (DIM,)],
    ),
    'depthwise_conv': (
        lambda x, weight, bias: ops.depthwise_conv(x, weight, bias, 'silu'),
        [MAP, (DIM, 1, 3, 3), (DIM,)],
    ),
    'gated_layer_norm': (ops.gated_layer_norm, [(2, 3, 5), (2, 3, 5), (5,), (5,)]),
}


def make(op, dtype):
    """A scalar function of the op's inputs, these, and a direction for each."""
    function, shapes = OPS[op]
    generator = torch.Generator().manual_seed(0)
    inputs, directions = (
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
        for _ in range(2)
    )
    return lambda *tensors: function(*tensors).pow(3).sum(), inputs, directions


def third(function, inputs, directions):
    """The gradient of the second derivative along a direction."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    result = function(*leaves)
    for _ in range(2):
        first = torch.autograd.grad(result, leaves, create_graph=True)
        result = sum((f * d).sum() for f, d in zip(first, directions))
    return torch.autograd.grad(result, leaves)


def second(function, inputs, directions):
    """Second derivatives along a direction, by two ways through autograd of which the first needs no third ones."""
    _, vhp = torch.autograd.functional.vhp(function, inputs, directions)
    _, hvp = torch.autograd.functional.hvp(function, inputs, directions)
    return vhp, hvp


def third_by_differences(function, inputs, directions, step=1e-5):
    products = []
    for sign in (1, -1):
        moved = tuple(t + sign * step * d for t, d in zip(inputs, directions))
        products.append(torch.autograd.functional.vhp(function, moved, directions)[1])
    return [(a - b) / (2 * step) for a, b in zip(*products)]


@pytest.mark.parametrize('op', OPS)
def test_second_and_third_derivatives(backend, op):
    with ops.use_backend('torch'):
        double = make(op, torch.float64)
        true_second, hvp = second(*double)
        true_third = third_by_differences(*double)
        torch.testing.assert_close(hvp, true_second, rtol=1e-9, atol=1e-9)
        # The torch backend's is PyTorch's LayerNorm, whose third derivatives are wrong (torch 2.14).
        if op != 'gated_layer_norm':
            for value, expected in zip(third(*double), true_third):
                assert relative_error(value, expected) < 1e-6
    if backend == 'torch':
        return
    single = make(op, torch.float32)
    vhp, hvp = second(*single)
    for truth, values in ((true_second, vhp), (true_second, hvp), (true_third, third(*single))):
        for value, expected in zip(values, truth):
            assert relative_error(value, expected) < 1e-4


@pytest.mark.parametrize('op', OPS)
def test_double_backward_of_float64(op):
    function, inputs, _ = make(op, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize('op', OPS)
def test_function_transforms(op, monkeypatch):
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    function, inputs, directions = make(op, torch.float64)
    everywhere = tuple(range(len(inputs)))
    grad = torch.func.grad(function, everywhere)
    leaves = [t.clone().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(function(*leaves), leaves)
    along = sum((t * d).sum() for t, d in zip(truth, directions))
    _, vhp = torch.autograd.functional.vhp(function, inputs, directions)
    torch.testing.assert_close(grad(*inputs), truth)
    torch.testing.assert_close(torch.func.jvp(function, inputs, directions)[1], along)
    torch.testing.assert_close(torch.func.jvp(grad, inputs, directions)[1], vhp)
    with forward_ad.dual_level():
        result = function(*map(forward_ad.make_dual, inputs, directions))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, along)
    # Per-sample gradients, with the first input of every sample its own, and the last one shared.
    dims = (0, *[None] * (len(inputs) - 1))
    batch = torch.stack([inputs[0], directions[0]])
    per_sample = torch.vmap(grad, dims)(batch, *inputs[1:])
    for i, sample in enumerate(batch):
        torch.testing.assert_close(tuple(g[i] for g in per_sample), grad(sample, *inputs[1:]))


@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
@pytest.mark.parametrize('op', OPS)
def test_function_transforms_are_refused_by_a_backend_asked_for_by_name(op):
    function, inputs, directions = make(op, torch.float32)
    message = "use_backend asks for the backend 'native', which cannot run here: it has neither function transforms"
    with ops.use_backend('native'), pytest.raises(ValueError, match=message):
        torch.func.jvp(function, inputs, directions)
