import pytest
import torch
from test_ops.truth import relative_error

from mmspatialmamba.ops import biased_gelu

pytestmark = pytest.mark.usefixtures('poisoned_memory', 'backend')


def make_inputs(shape):
    generator = torch.Generator().manual_seed(shape[-1])
    return [torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)]


def truth(x, bias):
    h = x + bias
    return h * 0.5 * torch.erfc(-h / 2**0.5)


@pytest.mark.parametrize('shape', [(1, 5), (2, 5, 64), (130, 35), (3, 4, 5, 96)], ids=str)
def test_output_and_gradients(shape):
    inputs = make_inputs(shape)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = biased_gelu(*leaves)
    true_leaves = [t.double().requires_grad_() for t in inputs]
    expected = truth(*true_leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(out, expected) < 2e-6
    for name, leaf, true_leaf in zip(('x', 'bias'), leaves, true_leaves):
        assert relative_error(leaf.grad, true_leaf.grad) < 5e-6, name


def test_the_whole_range_of_floats(backend):
    x = torch.cat([torch.linspace(-15, 15, 6001), torch.tensor([-1e30, -1e-30, 0.0, 1e-30, 1e30, torch.inf])])
    zero = torch.zeros(1)
    if backend == 'torch':
        # PyTorch's own GELU of float32 is off by up to 8e-7 on processors with AVX-512.
        x, zero = x.double(), zero.double()
    out = biased_gelu(x.unsqueeze(1), zero).squeeze(1)
    expected = truth(x[:-1].double(), zero.double())
    torch.testing.assert_close(out[:-1].double(), expected, rtol=2e-6, atol=4e-7)
    assert out[-1] == torch.inf
    assert biased_gelu(torch.tensor([[torch.nan], [1.0]]), zero).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=str)
@pytest.mark.parametrize('dim', [35, 64])
def test_half_precision(dtype, bound, dim):
    inputs = [t.to(dtype) for t in make_inputs((9, dim))]
    out = biased_gelu(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, truth(*(t.double() for t in inputs))) < bound


def test_bad_input_is_named():
    x, bias = make_inputs((3, 6))
    with pytest.raises(ValueError, match=r'biased_gelu: bias must have the shape \(6\)'):
        biased_gelu(x, bias[:3])
    with pytest.raises(TypeError, match='biased_gelu: x'):
        biased_gelu(x.long(), bias)
