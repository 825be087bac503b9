import pytest
import torch
import torch.nn.functional as F
from test_ops.truth import relative_error

from mmspatialmamba import ops
from mmspatialmamba.ops import depthwise_conv

pytestmark = pytest.mark.usefixtures('poisoned_memory', 'backend')

SHAPES = [(1, 1, 1, 1), (2, 64, 9, 13), (1, 35, 1, 40), (2, 40, 70, 3)]


def make_inputs(shape, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(shape[1])
    dim = shape[1]
    x = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
    return [x, torch.randn(dim, 1, 3, 3, generator=generator), torch.randn(dim, generator=generator)]


def truth(x, weight, bias, finish):
    out = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    return {'none': out, 'silu': out * torch.sigmoid(out), 'residual': out + x}[finish]


@pytest.mark.parametrize('finish', ['none', 'silu', 'residual'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_output_and_gradients(shape, memory_format, finish):
    inputs = make_inputs(shape, memory_format)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = depthwise_conv(*leaves, finish)
    assert out.shape == shape
    true_leaves = [t.double().requires_grad_() for t in inputs]
    expected = truth(*true_leaves, finish)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(out, expected) < 1e-6
    for name, leaf, true_leaf in zip(('x', 'weight', 'bias'), leaves, true_leaves):
        assert relative_error(leaf.grad, true_leaf.grad) < 5e-6, name


def test_part_of_a_wider_map(backend):
    x, weight, bias = make_inputs((2, 64, 9, 13))
    wide = torch.randn(2, 9, 13, 100)
    wide[..., 20:84] = x.permute(0, 2, 3, 1)
    part = wide[..., 20:84].permute(0, 3, 1, 2)
    assert relative_error(depthwise_conv(part, weight, bias, 'silu'), truth(x, weight, bias, 'silu')) < 1e-6


# Everything before is float32; the output is rounded once.
@pytest.mark.parametrize('finish', ['silu', 'residual'])
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision(dtype, bound, finish):
    for dim in (64, 40):
        inputs = [t.to(dtype) for t in make_inputs((2, dim, 9, 13), torch.channels_last)]
        out = depthwise_conv(*inputs, finish)
        assert out.dtype == dtype
        assert relative_error(out, truth(*(t.double() for t in inputs), finish)) < bound
        inputs[1] = inputs[1].transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(depthwise_conv(*inputs, finish), out)


@pytest.mark.parametrize('finish', ['none', 'silu', 'residual'])
def test_autocast_changes_nothing_on_the_cpu(finish):
    inputs = make_inputs((2, 40, 9, 13))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = depthwise_conv(*inputs, finish)
    torch.testing.assert_close(out, depthwise_conv(*inputs, finish), rtol=0, atol=0)


def test_dtypes_may_differ():
    x, weight, bias = make_inputs((2, 40, 9, 13))
    out = depthwise_conv(x.bfloat16(), weight, bias.half(), 'silu')
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth(x.bfloat16().double(), weight.double(), bias.half().double(), 'silu')) < 2**-8


@pytest.mark.parametrize('finish', ['none', 'silu'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_gradients_in_half_precision(dtype, bound, memory_format, finish):
    for dim in (64, 40):
        leaves = [t.to(dtype).requires_grad_() for t in make_inputs((2, dim, 9, 13), memory_format)]
        true_leaves = [t.detach().double().requires_grad_() for t in leaves]
        grad = torch.randn(2, dim, 9, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
        depthwise_conv(*leaves, finish).backward(grad)
        truth(*true_leaves, finish).backward(grad.double())
        for name, leaf, true_leaf in zip(('x', 'weight', 'bias'), leaves, true_leaves):
            assert leaf.grad.dtype == dtype
            assert relative_error(leaf.grad, true_leaf.grad) < bound, name


def test_second_derivative():
    inputs = [t.requires_grad_() for t in make_inputs((1, 2, 3, 4))]
    (first,) = torch.autograd.grad(depthwise_conv(*inputs, 'silu').sum(), inputs[0], create_graph=True)
    second = torch.autograd.grad(first.square().sum(), inputs)
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    (first,) = torch.autograd.grad(truth(*leaves, 'silu').sum(), leaves[0], create_graph=True)
    for value, expected in zip(second, torch.autograd.grad(first.square().sum(), leaves)):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize(
    'index, value, message',
    [
        (0, torch.zeros(2, 3, 4), r'x must have the shape \(\*, \*, \*, \*\)'),
        (1, torch.zeros(3, 1, 5, 5), r'weight must have the shape \(3, 1, 3, 3\)'),
        (2, torch.zeros(2), r'bias must have the shape \(3\)'),
        (3, 'relu', "finish must be one of 'none', 'silu', 'residual', but is 'relu'"),
    ],
    ids=['x', 'weight', 'bias', 'finish'],
)
def test_bad_input_is_named(index, value, message):
    arguments = [*make_inputs((1, 3, 4, 5)), 'none']
    arguments[index] = value
    with pytest.raises(ValueError, match=f'depthwise_conv: {message}'):
        depthwise_conv(*arguments)


@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
def test_the_compiled_op_refuses_what_does_not_fit():
    x, weight, bias = make_inputs((1, 6, 3, 4))
    native = torch.ops.mmspatialmamba_native.depthwise_conv
    with pytest.raises(RuntimeError, match=r'depthwise_conv: bias must have shape \(6\), but has \[5\]'):
        native(x, weight, bias[:5], 'none')
    with pytest.raises(RuntimeError, match='shape'):
        native(x, weight[:5], bias, 'none')
