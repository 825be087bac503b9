import pytest
import torch
from test_ops.truth import dilated_convolutions, relative_error, sequential_scan

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.ops import structure_aware_scan

pytestmark = pytest.mark.usefixtures('poisoned_memory')

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'kernel1', 'kernel3', 'kernel5', 'alpha', 'delta_bias')


def make_inputs(batch, dim, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * 100 + width)
    shapes = [(batch, dim, height, width)] * 2 + [(dim, 1)] + [(batch, 1, height, width)] * 2
    shapes += [(dim,)] + [(dim, 1, 3, 3)] * 3 + [(3,), (dim,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    inputs[2] = -inputs[2].exp()
    return inputs


def run(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    return structure_aware_scan(u, delta, A, B, C, D, (k1, k3, k5), alpha, delta_bias)


def truth(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    h = sequential_scan(u.flatten(2), delta.flatten(2), A, B.flatten(2), delta_bias, delta_softplus=True)
    g = dilated_convolutions(h[:, :, 0].view(u.shape), (k1, k3, k5), alpha)
    return C * g + D.view(-1, 1, 1) * u


@pytest.mark.parametrize('height, width', [(1, 1), (1, 40), (40, 1), (6, 5), (17, 23)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_forward_and_gradients_equal_sequential(backend, height, width, memory_format):
    inputs = make_inputs(2, 3, height, width)
    leaves = [t.clone().requires_grad_() for t in inputs]
    u, delta = (t.contiguous(memory_format=memory_format) for t in leaves[:2])
    out = run(u, delta, *leaves[2:])
    truth_leaves = [t.double().requires_grad_() for t in inputs]
    expected = truth(*truth_leaves)
    assert out.dtype == torch.float32
    assert relative_error(out, expected) < 2e-6
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad_out)
    expected.backward(grad_out.double())
    for name, leaf, truth_leaf in zip(NAMES, leaves, truth_leaves):
        assert relative_error(leaf.grad, truth_leaf.grad) < 5e-6, name


def test_float64_gradients():
    leaves = [t.requires_grad_() for t in make_inputs(1, 2, 4, 5, torch.float64)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.slow
def test_float64_second_derivatives():
    leaves = [t.requires_grad_() for t in make_inputs(1, 1, 2, 3, torch.float64)]
    assert torch.autograd.gradgradcheck(run, leaves)


# The output is rounded once to the input's dtype; everything before is float32.
@pytest.mark.parametrize(
    'dtype, bound', [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=['bfloat16', 'float16']
)
def test_half_precision_has_a_float32_state(backend, dtype, bound):
    inputs = make_inputs(2, 3, 9, 8, dtype)
    out = run(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, truth(*(t.double() for t in inputs))) < bound


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('dim', [32, 40])
def test_half_precision_in_either_layout(backend, dim, dtype):
    """Whole blocks of channels that lie side by side are read and written in place."""
    inputs = make_inputs(2, dim, 13, 9, dtype)
    u, delta = (t.contiguous(memory_format=torch.channels_last) for t in inputs[:2])
    out = run(u, delta, *inputs[2:])
    assert relative_error(out, truth(*(t.double() for t in inputs))) < (2**-8 if dtype == torch.bfloat16 else 2**-11)
    if backend == 'native':
        assert torch.equal(out, run(*inputs))
        assert torch.equal(out, run(u, *inputs[1:]))
        assert torch.equal(out, run(u, delta.float(), *inputs[2:]))


# PyTorch has float16 autocast on a CPU since 2.3.
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16][: 2 if TORCH >= (2, 3) else 1], ids=str)
def test_autocast_changes_nothing_inside(backend, dtype):
    leaves = [t.requires_grad_() for t in make_inputs(2, 3, 9, 8)]
    expected = run(*leaves)
    expected.sum().backward()
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with torch.autocast('cpu', dtype=dtype):
        out = run(*leaves)
        out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for leaf, grad in zip(leaves, grads):
        torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    'index, message',
    [
        (1, r'delta must have the shape \(1, 3, 4, 5\)'),
        (2, r'A must have the shape \(3, 1\)'),
        (3, r'B must have the shape \(1, 1, 4, 5\)'),
        (4, r'C must have the shape \(1, 1, 4, 5\)'),
        (5, r'D must have the shape \(3\)'),
        (10, r'delta_bias must have the shape \(3\)'),
    ],
    ids=['delta', 'A', 'B', 'C', 'D', 'delta_bias'],
)
def test_bad_input_is_named(index, message):
    inputs = make_inputs(1, 3, 4, 5)
    inputs[index] = inputs[index][..., :0]
    with pytest.raises(ValueError, match=f'structure_aware_scan: {message}'):
        run(*inputs)


@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
@pytest.mark.parametrize('index', [1, 2, 3, 4, 5, 6, 9, 10], ids=lambda index: NAMES[index])
def test_the_compiled_op_refuses_what_does_not_fit(index):
    inputs = make_inputs(2, 3, 4, 5)
    inputs[index] = inputs[index][..., :-1]
    with pytest.raises(RuntimeError, match='structure_aware_scan: .* must have'):
        torch.ops.mmspatialmamba_native.structure_aware_scan(*inputs, True)
