import pytest
import torch
from test_ops.truth import relative_error

from mmspatialmamba.ops import linear_gelu

pytestmark = pytest.mark.usefixtures('poisoned_memory', 'backend')


def make_inputs(shape, features):
    generator = torch.Generator().manual_seed(features)
    x, weight = torch.randn(shape, generator=generator), torch.randn(features, shape[-1], generator=generator)
    return [x, weight, torch.randn(features, generator=generator)]


def truth(x, weight, bias):
    h = x @ weight.t() + bias
    return h * 0.5 * torch.erfc(-h / 2**0.5)


@pytest.mark.parametrize('shape, features', [((1, 3), 5), ((2, 5, 8), 64), ((130, 4), 35), ((3, 4, 5, 6), 96)], ids=str)
def test_output_and_gradients(shape, features):
    inputs = make_inputs(shape, features)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = linear_gelu(*leaves)
    true_leaves = [t.double().requires_grad_() for t in inputs]
    expected = truth(*true_leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(out, expected) < 2e-6
    for name, leaf, true_leaf in zip(('x', 'weight', 'bias'), leaves, true_leaves):
        assert relative_error(leaf.grad, true_leaf.grad) < 5e-6, name


def test_the_whole_range_of_floats():
    x = torch.cat([torch.linspace(-15, 15, 6001), torch.tensor([-1e30, -1e-30, 0.0, 1e-30, 1e30, torch.inf])])
    out = linear_gelu(x.unsqueeze(1), torch.ones(1, 1), torch.zeros(1)).squeeze(1)
    expected = truth(x[:-1].double().unsqueeze(1), torch.ones(1, 1).double(), torch.zeros(1).double()).squeeze(1)
    torch.testing.assert_close(out[:-1].double(), expected, rtol=2e-6, atol=4e-7)
    assert out[-1] == torch.inf
    nan = linear_gelu(torch.tensor([[torch.nan], [1.0]]), torch.ones(1, 1), torch.zeros(1))
    assert nan.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=str)
@pytest.mark.parametrize('features', [35, 64])
def test_half_precision(dtype, bound, features):
    inputs = [t.to(dtype) for t in make_inputs((9, 8), features)]
    out = linear_gelu(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, truth(*(t.double() for t in inputs))) < bound


def test_autocast():
    inputs = make_inputs((9, 8), 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = linear_gelu(*inputs)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth(*(t.double() for t in inputs))) < 2**-6


@pytest.mark.parametrize(
    'index, message',
    [(1, r'weight must have the shape \(\*, 4\)'), (2, r'bias must have the shape \(6\)')],
    ids=['weight', 'bias'],
)
def test_bad_input_is_named(index, message):
    inputs = make_inputs((3, 4), 6)
    inputs[index] = inputs[index][..., :3]
    with pytest.raises(ValueError, match=f'linear_gelu: {message}'):
        linear_gelu(*inputs)
