import pytest
import torch
import torch.nn.functional as F
from test_ops.truth import relative_error

from mmspatialmamba.compat import TORCH
from mmspatialmamba.ops import gated_layer_norm

pytestmark = pytest.mark.usefixtures('poisoned_memory', 'backend')


def make_inputs(shape):
    generator = torch.Generator().manual_seed(shape[-1])
    x, gate = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [3 * x + 1, gate, weight, bias]


def truth(x, gate, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5) * gate * torch.sigmoid(gate)


@pytest.mark.parametrize('shape', [(1, 5), (2, 5, 64), (130, 35), (3, 4, 5, 96)], ids=str)
def test_output_and_gradients(shape):
    inputs = make_inputs(shape)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = gated_layer_norm(*leaves)
    true_leaves = [t.double().requires_grad_() for t in inputs]
    expected = truth(*true_leaves)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(out, expected) < 1e-6
    for name, leaf, true_leaf in zip(('x', 'gate', 'weight', 'bias'), leaves, true_leaves):
        assert relative_error(leaf.grad, true_leaf.grad) < 5e-6, name


def test_gate_that_is_part_of_a_wider_tensor():
    x, gate, weight, bias = make_inputs((6, 7, 32))
    wide = torch.cat([torch.randn(6, 7, 32), gate], dim=-1)
    out = gated_layer_norm(x, wide.chunk(2, dim=-1)[1], weight, bias)
    assert relative_error(out, truth(x.double(), gate.double(), weight.double(), bias.double())) < 1e-6


# PyTorch has float16 LayerNorm on a CPU since 2.2.
HALF_BOUNDS = [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)][: 2 if TORCH >= (2, 2) else 1]


@pytest.mark.parametrize('dtype, bound', HALF_BOUNDS, ids=str)
@pytest.mark.parametrize('dim', [35, 64])
def test_half_precision(dtype, bound, dim):
    inputs = [t.to(dtype) for t in make_inputs((9, dim))]
    out = gated_layer_norm(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, truth(*(t.double() for t in inputs))) < bound


def test_large_mean_is_taken_off_first():
    x, gate, weight, bias = make_inputs((9, 64))
    shifted = x + 1000
    expected = truth(shifted.double(), gate.double(), weight.double(), bias.double())
    assert relative_error(gated_layer_norm(shifted, gate, weight, bias), expected) < 1e-4


@pytest.mark.parametrize(
    'index, message',
    [(1, r'gate must have the shape \(4, 6\)'), (2, r'weight must have the shape \(6\)'), (3, 'bias')],
    ids=['gate', 'weight', 'bias'],
)
def test_bad_input_is_named(index, message):
    inputs = make_inputs((4, 6))
    inputs[index] = inputs[index][..., :5]
    with pytest.raises(ValueError, match=f'gated_layer_norm: {message}'):
        gated_layer_norm(*inputs)
