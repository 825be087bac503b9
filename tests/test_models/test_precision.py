"""Products in bfloat16 and float16 on processors with and without instructions for them."""

import pytest
import torch
import torch.nn.functional as F

from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers.conv import PointwiseConv
from mmspatialmamba.models.layers.precision import Conv2d, Linear
from mmspatialmamba.ops import depthwise_conv, precision, use_backend

HALF = (torch.bfloat16, torch.float16)


def layers():
    return {
        'linear': (Linear(6, 5), (3, 7, 6)),
        'convolution': (Conv2d(6, 5, 3, padding=1, bias=False), (2, 6, 7, 4)),
        'pointwise': (PointwiseConv(6, 5, 1), (2, 6, 7, 4)),
    }


@pytest.fixture(params=[(), HALF], ids=['instructions', 'no-instructions'])
def processor(request, monkeypatch):
    monkeypatch.setattr(precision, '_SLOW_DTYPES', request.param)
    return request.param


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('autocast', [False, True], ids=['weights', 'autocast'])
@pytest.mark.parametrize('name', layers())
def test_product_is_right_and_of_the_dtype_asked_for(processor, name, autocast, dtype):
    torch.manual_seed(0)
    layer, shape = layers()[name]
    x = torch.randn(shape)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        y = layer(x)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
    assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, [x, *layer.parameters()]))

    truth, exact = layer.double(), x.detach().double().requires_grad_()
    expected = truth(exact)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    for grad, value in zip(grads, torch.autograd.grad(expected.square().sum(), [exact, *truth.parameters()])):
        torch.testing.assert_close(grad.double(), value, rtol=5e-2, atol=5e-2 * value.abs().max().item())


def test_without_instructions_products_run_in_float32(monkeypatch):
    monkeypatch.setattr(precision, '_SLOW_DTYPES', HALF)
    seen = []

    def product(x, weight, bias):
        seen.append((x.dtype, weight.dtype, bias))
        return x @ weight

    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert precision.in_fast_precision(product, x, torch.ones(3, 2), None).dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32, None)]


@pytest.mark.parametrize('finish', ['none', 'silu', 'residual'])
@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_depthwise_convolutions(processor, dtype, finish, monkeypatch):
    seen, convolve = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, *args, **kwargs: seen.append(x.dtype) or convolve(x, *args, **kwargs))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 40, 9, 13), torch.randn(40, 1, 3, 3), torch.randn(40)
    with use_backend('torch'):
        expected = depthwise_conv(x, weight, bias, finish)
        out = depthwise_conv(x.to(dtype), weight.to(dtype), bias.to(dtype), finish)
    assert seen == [torch.float32, torch.float32 if processor else dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=0.1)


def test_autocast_leaves_float64_alone(processor):
    x, weight, bias = (torch.rand(*shape, dtype=torch.float64) for shape in ((1, 4, 5, 6), (4, 1, 3, 3), (4,)))
    with torch.autocast('cpu', torch.bfloat16):
        assert depthwise_conv(x, weight, bias).dtype == torch.float64
        assert Linear(6, 3).double()(x).dtype == torch.float64


@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_backbone_with_half_weights(processor, dtype):
    torch.manual_seed(0)
    backbone = SpatialMamba(arch=dict(embed_dims=8, depths=(1, 1)), out_indices=(0, 1)).eval()
    image = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        expected = backbone(image)
        outputs = backbone.to(dtype)(image.to(dtype))
    for output, value in zip(outputs, expected):
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), value, rtol=0.1, atol=0.1)
