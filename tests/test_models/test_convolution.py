"""Convolutions of channels-last maps train as PyTorch's do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.flop_counter import FlopCounterMode

from mmspatialmamba import ops
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import convolution
from mmspatialmamba.models.layers.convolution import ChannelsLastConvolution
from mmspatialmamba.models.layers.precision import Conv2d
from mmspatialmamba.ops import backend

# Batch, channels in and out, height, width, kernel, stride.
CASES = [
    (1, 3, 4, 1, 1, 3, 1),
    (2, 5, 7, 9, 6, 3, 1),
    (2, 5, 7, 9, 6, 3, 2),
    (1, 4, 6, 8, 7, 5, 2),
    (3, 33, 20, 5, 12, 3, 1),
]
CPU_BACKENDS = [name for name in ops.available_backends() if name != 'triton']


def make(case, dtype=torch.float32):
    torch.manual_seed(0)
    batch, channels, out, height, width, kernel, stride = case
    conv = Conv2d(channels, out, kernel, stride, kernel // 2).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return conv, x.requires_grad_()


@pytest.mark.parametrize('rows', [2**20, 1], ids=['whole', 'by rows'])
@pytest.mark.parametrize('name', CPU_BACKENDS)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_output_and_gradients(case, name, rows, monkeypatch):
    monkeypatch.setattr(convolution, '_GROUP_ELEMENTS', rows)
    conv, x = make(case)
    leaves = [x, conv.weight, conv.bias]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with ops.use_backend(name):
        out = ChannelsLastConvolution.apply(*leaves, conv.stride, conv.padding)
        expected = F.conv2d(*exact, conv.stride, conv.padding)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
    for mine, true in zip(grads, torch.autograd.grad(expected, exact, grad.double())):
        assert (mine - true).norm() < 2e-6 * true.norm()


def test_second_derivatives():
    conv, x = make((2, 2, 3, 4, 3, 3, 2), torch.float64)
    leaves = [x, conv.weight, conv.bias]
    with ops.use_backend('torch'):
        torch.autograd.gradgradcheck(
            lambda *tensors: ChannelsLastConvolution.apply(*tensors, conv.stride, conv.padding), leaves
        )


def test_when_it_is_used():
    conv, x = make((2, 5, 7, 9, 6, 3, 1))

    def is_used(conv, x):
        return 'ChannelsLast' in type(conv(x).grad_fn).__name__

    assert is_used(conv, x) == backend.has_products(x)
    assert not is_used(conv, x.contiguous())
    assert not is_used(Conv2d(5, 5, 3, padding=1, padding_mode='reflect'), x)
    assert not is_used(Conv2d(5, 5, 3, padding='same'), x)
    with ops.use_backend('torch'):
        assert not is_used(conv, x)
    assert not is_used(Conv2d(5, 5, 3, padding=1, groups=5), x)
    assert not is_used(Conv2d(5, 5, 3, padding=1).double(), x.double())
    with torch.no_grad():
        assert not is_used(conv, x)
    conv.weight.requires_grad_(False)
    assert not is_used(conv, x)


def test_compiled_code_has_one_operator_for_the_gradients():
    conv, x = make((2, 5, 7, 9, 6, 3, 1))
    compiler = AotEagerAndRecordGraphs()
    out = torch.compile(conv, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(out, conv(x))
    grads = [torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias]) for y in (out, conv(x))]
    torch.testing.assert_close(*grads)
    operators = [str(node.target) for node in compiler.bw_graphs[0].graph.nodes]
    assert operators.count('aten.convolution_backward.default') == 1
    assert not any('linear_weight_gradient' in operator for operator in operators)


def test_only_the_gradients_that_are_needed_are_computed():
    conv, x = make((2, 5, 7, 9, 6, 3, 1))
    out = conv(x.detach())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * out.numel() * 5 * 9
    assert x.grad is None and conv.weight.grad.shape == conv.weight.shape


def test_backward_under_autocast_stays_in_float32():
    conv, x = make((2, 5, 7, 9, 6, 3, 1))
    (expected,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    loss = conv(x).square().sum()
    with torch.autocast('cpu', torch.bfloat16):
        (grad,) = torch.autograd.grad(loss, conv.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)


def test_nothing_is_written_into_a_view():
    """Autograd would copy whole maps in the backward pass, to write a part of them."""
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    nodes, seen = [output.grad_fn for output in SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))(image)], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [function for function, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert 'ReluBackward0' in names and 'CopySlices' not in names
