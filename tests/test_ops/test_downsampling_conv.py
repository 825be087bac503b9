from __future__ import annotations

import pytest
import torch
from test_ops.truth import relative_error

from mmspatialmamba import ops
from mmspatialmamba.models.layers.conv import Downsample
from mmspatialmamba.ops.depthwise_conv import downsampling_conv, fuses_downsampling
from mmspatialmamba.ops.torch_backend import downsampling_conv as truth

pytestmark = [
    pytest.mark.usefixtures('poisoned_memory'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops'),
]
SHAPES = [(1, 16, 1, 1), (2, 32, 1, 2), (2, 16, 2, 1), (2, 144, 5, 6), (1, 48, 6, 5), (2, 528, 17, 20), (1, 16, 40, 33)]


def make(shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    parameters = torch.randn(shape[1], 1, 3, 3) / 3, torch.randn(shape[1])
    return [t.requires_grad_() for t in (x, *parameters)]


@pytest.mark.parametrize('layout', ['channels_last', 'contiguous', 'slice'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_output_and_gradients(shape, layout):
    inputs = make(shape)
    x = inputs[0].detach()
    if layout == 'contiguous':
        x = x.contiguous()
    elif layout == 'slice':
        x = torch.stack([x, x], dim=-1)[..., 0]
    inputs[0] = x.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = downsampling_conv(*inputs), truth(*exact)
    assert relative_error(out, expected) < 2e-6
    grad = torch.randn(expected.shape)
    for mine, true in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())):
        assert mine.shape == true.shape
        assert relative_error(mine, true) < 5e-6


def test_second_derivatives():
    inputs = make((2, 16, 5, 4))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    seconds = []
    for function, tensors in ((downsampling_conv, inputs), (truth, exact)):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), tensors))
    for mine, true in zip(*seconds):
        assert relative_error(mine, true) < 1e-5


def test_special_values_are_those_of_relu():
    x, weight, bias = make((1, 16, 9, 9))
    with torch.no_grad():
        x[0, 3, 4, 4], x[0, 5] = torch.nan, 0.0
    exact = x.detach().requires_grad_()
    out, expected = downsampling_conv(x, weight, bias), truth(exact, weight, bias)
    assert out.isnan().nonzero().tolist() == [[0, 3, 2, 2]]
    for y, leaf in ((out, x), (expected, exact)):
        y.nan_to_num().sum().backward(inputs=[leaf])
    torch.testing.assert_close(x.grad, exact.grad, equal_nan=True)


def test_threads_change_no_bit():
    before, results = torch.get_num_threads(), []
    inputs = make((2, 528, 35, 20))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = downsampling_conv(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_opcheck():
    namespace = torch.ops.mmspatialmamba_native
    for layout in (torch.channels_last, torch.contiguous_format):
        x, *parameters = (t.detach() for t in make((2, 16, 5, 4)))
        inputs = [x.contiguous(memory_format=layout), *parameters]
        output = downsampling_conv(*inputs)
        torch.library.opcheck(namespace.downsampling_conv_backward.default, [torch.ones_like(output), output, *inputs])
        torch.library.opcheck(namespace.downsampling_conv.default, [t.requires_grad_() for t in inputs])


def test_what_does_not_fit_is_refused():
    x, weight, bias = make((1, 16, 4, 4))
    with pytest.raises(RuntimeError, match='downsampling_conv: the number of channels must be a multiple of 16'):
        downsampling_conv(x[:, :8], weight[:8], bias[:8])
    with pytest.raises(RuntimeError, match='downsampling_conv: weight and bias must have 16 channels, but have shapes'):
        downsampling_conv(x, weight[:8], bias)
    with pytest.raises(RuntimeError, match='downsampling_conv: x must be a float32 CPU tensor of shape'):
        downsampling_conv(x.double(), weight, bias)


@pytest.mark.parametrize('channels', [4, 5], ids=['fused', 'of an odd number of channels'])
def test_a_layer_and_its_gradients(channels):
    torch.manual_seed(0)
    layer = Downsample(channels, dict(type='BN'))
    assert fuses_downsampling(torch.randn(1, 8 * channels, 2, 2)) in (False, channels == 4)
    exact = Downsample(channels, dict(type='BN')).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, channels, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    out, expected = layer(x), exact(exact_x)
    assert relative_error(out, expected) < 5e-6
    grad = torch.randn(out.shape)
    mine = torch.autograd.grad(out, [x, *layer.parameters()], grad)
    true = torch.autograd.grad(expected, [exact_x, *exact.parameters()], grad.double())
    for name, a, b in zip(['x', *dict(layer.named_parameters())], mine, true):
        # A bias before BatchNorm has no gradient but what rounding leaves.
        assert name == '2.conv.bias' or relative_error(a, b) < 2e-5, name


@pytest.mark.parametrize('name', ['0', '0.act', '1', '1.conv', '1.act'])
def test_hooks_are_called(name):
    layer, calls = Downsample(4, dict(type='BN')), []
    layer.get_submodule(name).register_forward_hook(lambda *args: calls.append(name))
    layer(torch.randn(1, 4, 6, 6))
    assert calls == [name]


@pytest.mark.parametrize('name', ['0', '0.conv', '1', '1.conv', '2'])
def test_replaced_modules_are_called(name):
    class Adapted(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x).flip(1)

    layer, x = Downsample(4, dict(type='BN')), torch.randn(1, 4, 6, 6)
    plain = layer(x)
    parent, _, child = name.rpartition('.')
    setattr(layer.get_submodule(parent), child, Adapted(layer.get_submodule(name)))
    assert not torch.allclose(layer(x), plain)
