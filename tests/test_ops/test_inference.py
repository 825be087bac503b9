from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_ops.truth import relative_error

from mmspatialmamba import ops

pytestmark = [
    pytest.mark.usefixtures('poisoned_memory'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops'),
]


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def without_norms(parameters):
    """Weights and biases as the ops take convolutions."""
    return [
        part for weight, bias in zip(parameters[::2], parameters[1::2], strict=True) for part in (weight, bias, [], 0.0)
    ]


def downsample(x, *parameters):
    return torch.ops.mmspatialmamba_native.downsample(x, *without_norms(parameters))


def stem(x, *parameters):
    return torch.ops.mmspatialmamba_native.stem(x, *without_norms(parameters))


def block(x, parameters):
    return torch.ops.mmspatialmamba_native.block(x, **parameters)


def layer_norm_planes(x, weight, bias, eps=1e-5):
    return torch.ops.mmspatialmamba_native.layer_norm_planes(x, weight, bias, eps)


def make_weight(*shape):
    return torch.randn(shape) / shape[1] ** 0.5


def make_downsample(channels, hidden, out):
    return (
        *(make_weight(hidden, channels), torch.randn(hidden)),
        *(torch.randn(hidden, 1, 3, 3) / 3, torch.randn(hidden)),
        *(make_weight(out, hidden), torch.randn(out)),
    )


def exact_downsample(x, parameters):
    w1, b1, w2, b2, w3, b3 = (t.double() for t in parameters)
    hidden = F.linear(x.double(), w1, b1).relu().permute(0, 3, 1, 2)
    hidden = F.conv2d(hidden, w2, b2, stride=2, padding=1, groups=len(w2)).relu()
    return F.linear(hidden.permute(0, 2, 3, 1), w3, b3)


def make_stem(channels, half, middle, wide, out):
    def conv(out, channels):
        return torch.randn(out, channels, 3, 3) / (3 * channels**0.5), torch.randn(out)

    convs = *conv(half, channels), *conv(middle, half), *conv(half, middle), *conv(wide, half)
    return *convs, make_weight(out, wide), torch.randn(out)


def exact_stem(x, parameters):
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = (t.double() for t in parameters)
    x = F.conv2d(x.double().permute(0, 3, 1, 2), w1, b1, stride=2, padding=1).relu()
    x = x + F.conv2d(F.conv2d(x, w2, b2, padding=1).relu(), w3, b3, padding=1)
    return F.linear(F.conv2d(x, w4, b4, stride=2, padding=1).relu().permute(0, 2, 3, 1), w5, b5)


def make_norm(channels):
    """A BatchNorm's weight, bias, mean and variance."""
    return [*torch.randn(3, channels), torch.rand(channels) + 0.5]


def folded(weight, bias, norm, eps):
    """A convolution's weight and bias, float64, that also does its BatchNorm's work."""
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if not norm:
        return weight.double(), bias.double()
    norm_weight, norm_bias, mean, variance = (t.double() for t in norm)
    scale = norm_weight / (variance + eps).sqrt()
    return weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)), norm_bias + (bias.double() - mean) * scale


def make_block(channels, inner, rank, hidden):
    """The op's arguments but for x."""

    def norm(name, dim, eps):
        return {f'{name}_weight': torch.randn(dim), f'{name}_bias': torch.randn(dim), f'{name}_eps': eps}

    def conv(name, dim):
        return {f'{name}_weight': torch.randn(dim, 1, 3, 3) / 3, f'{name}_bias': torch.randn(dim)}

    return dict(
        **conv('cpe1', channels),
        **norm('ln1', channels, 1e-5),
        in_proj_weight=make_weight(2 * inner, channels),
        **conv('conv', inner),
        x_proj_weight=make_weight(rank + 2, inner),
        dt_proj_weight=make_weight(inner, rank),
        dt_bias=torch.randn(inner),
        A_log=torch.randn(inner, 1),
        D=torch.randn(inner),
        **{f'k{dilation}': torch.randn(inner, 1, 3, 3) / 3 for dilation in (1, 3, 5)},
        alpha=torch.randn(3),
        **norm('out_norm', inner, 1e-2),
        out_proj_weight=make_weight(channels, inner),
        **conv('cpe2', channels),
        **norm('ln2', channels, 1e-1),
        fc1_weight=make_weight(hidden, channels),
        fc1_bias=torch.randn(hidden),
        fc2_weight=make_weight(channels, hidden),
        fc2_bias=torch.randn(channels),
    )


def exact_block(x, parameters):
    p = {name: torch.as_tensor(value).double() for name, value in parameters.items()}

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f'{name}_weight'], p[f'{name}_bias'], parameters[f'{name}_eps'])

    def conv(name, x):
        return F.conv2d(x, p[f'{name}_weight'], p[f'{name}_bias'], padding=1, groups=x.shape[1])

    x = x.double()
    x = (x + conv('cpe1', x)).permute(0, 2, 3, 1)
    u, gate = F.linear(norm('ln1', x), p['in_proj_weight']).chunk(2, -1)
    u = F.silu(conv('conv', u.permute(0, 3, 1, 2)))
    rank = p['dt_proj_weight'].shape[1]
    dt, B, C = F.linear(u.permute(0, 2, 3, 1), p['x_proj_weight']).split([rank, 1, 1], -1)
    delta, B, C = (t.permute(0, 3, 1, 2) for t in (F.linear(dt, p['dt_proj_weight']), B, C))
    kernels = p['k1'], p['k3'], p['k5']
    with ops.use_backend('torch'):
        y = ops.structure_aware_scan(u, delta, -p['A_log'].exp(), B, C, p['D'], kernels, p['alpha'], p['dt_bias'])
    x = x + F.linear(norm('out_norm', y.permute(0, 2, 3, 1)) * F.silu(gate), p['out_proj_weight'])
    x = x.permute(0, 3, 1, 2)
    x = (x + conv('cpe2', x)).permute(0, 2, 3, 1)
    x = x + F.linear(F.gelu(F.linear(norm('ln2', x), p['fc1_weight'], p['fc1_bias'])), p['fc2_weight'], p['fc2_bias'])
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    'shape, hidden, out',
    [
        ((1, 1, 1, 1), 1, 1),
        ((2, 1, 6, 8), 64, 16),
        ((1, 7, 2, 8), 64, 33),
        ((3, 6, 5, 7), 50, 20),
        ((2, 35, 9, 16), 130, 40),
        ((1, 40, 130, 8), 300, 16),
        ((1, 3, 700, 4), 40, 8),
    ],
    ids=str,
)
def test_downsample(shape, hidden, out):
    x, parameters = torch.randn(shape), make_downsample(shape[-1], hidden, out)
    expected = exact_downsample(x, parameters)
    assert relative_error(downsample(x, *parameters), expected) < 2e-6
    permuted = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert relative_error(downsample(permuted, *parameters), expected) < 2e-6


def in_bfloat16(parameters):
    """Tensors rounded to bfloat16, so that what is exact has the same numbers."""
    return type(parameters)(t.bfloat16() for t in parameters)


@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'shape, hidden, out',
    [
        ((1, 1, 1, 1), 1, 1),
        ((2, 1, 6, 8), 64, 16),
        ((1, 7, 2, 33), 64, 33),
        ((3, 6, 5, 7), 50, 20),
        ((2, 35, 9, 16), 130, 40),
        ((1, 3, 70, 64), 512, 128),
    ],
    ids=str,
)
def test_downsample_in_bfloat16(shape, hidden, out, weights):
    x, parameters = torch.randn(shape).bfloat16(), in_bfloat16(make_downsample(shape[-1], hidden, out))
    result = downsample(x, *(t.to(weights) for t in parameters))
    assert result.dtype == torch.bfloat16
    assert relative_error(result, exact_downsample(x, parameters)) < 1e-2


@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('channels', [4, 40])
def test_norms_are_folded(channels, dtype, weights):
    bound = 3e-6 if dtype == torch.float32 else 1e-2
    for op, exact, parameters in (
        ('downsample', exact_downsample, make_downsample(channels, 70, 33)),
        ('stem', exact_stem, make_stem(channels, 9, 33, 40, 50)),
    ):
        arguments = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            norm = make_norm(len(weight))
            for layer in ((weight, None, norm, 1e-5), (weight, bias, norm, 0.1), (weight, None, [], 0.0)):
                arguments.append(layer)
        for i in range(3):
            layers = [
                (w.to(weights), b if b is None else b.to(weights), [t.to(weights) for t in norm], eps)
                for w, b, norm, eps in arguments[i::3]
            ]
            x = torch.randn(2, 7, 6, channels).to(dtype)
            out = getattr(torch.ops.mmspatialmamba_native, op)(x, *(part for layer in layers for part in layer))
            assert out.dtype == dtype
            expected = exact(x, [part for layer in layers for part in folded(*layer)])
            assert relative_error(out, expected) < bound, (op, i)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_weights(dtype):
    """Of pixels, channels or parameters that do not lie side by side the same comes out."""
    layers = {downsample: make_downsample(40, 66, 33), stem: make_stem(40, 9, 33, 40, 50)}
    x = torch.randn(2, 7, 6, 40).to(dtype)
    for op, parameters in layers.items():
        expected = op(x, *parameters)
        others = [t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], -1)[..., 0] for t in parameters]
        assert torch.equal(op(x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), *parameters), expected)
        assert torch.equal(op(x, *others), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_without_images(dtype):
    x = torch.randn(0, 4, 6, 8, dtype=dtype)
    assert downsample(x, *make_downsample(8, 32, 4)).shape == (0, 2, 3, 4)
    assert stem(x, *make_stem(8, 4, 6, 8, 5)).shape == (0, 1, 2, 5)
    assert block(x, make_block(4, 8, 1, 16)).shape == x.shape
    assert layer_norm_planes(x, torch.randn(4), torch.randn(4)).shape == x.shape


# Tiles of 32 pixels, of as many channels as a vector has; tasks of 64 pixels.
@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format], ids=['channels_last', 'contiguous'])
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 5, 3, 7), (1, 64, 8, 8), (3, 33, 9, 11), (1, 70, 1, 129)], ids=str)
def test_layer_norm_planes(shape, layout, dtype, weights):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    weight, bias = (t.to(weights) for t in torch.randn(2, shape[1]))
    out = layer_norm_planes(x, weight, bias, 1e-2)
    expected = F.layer_norm(x.double().permute(0, 2, 3, 1), shape[1:2], weight.double(), bias.double(), 1e-2)
    assert out.dtype == dtype and out.is_contiguous()
    assert relative_error(out, expected.permute(0, 3, 1, 2)) < (1e-6 if dtype == torch.float32 else 2**-8)


def test_downsampled_in_parts():
    """What lies between the last two convolutions is more than is kept at a time, within an image and over images."""
    for shape in ((1, 300, 600, 2), (5, 120, 200, 2)):
        x, parameters = torch.randn(shape), make_downsample(2, 200, 3)
        assert relative_error(downsample(x, *parameters), exact_downsample(x, parameters)) < 2e-6


@pytest.mark.parametrize(
    'shape, dims',
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 1, 6, 3), (8, 8, 32, 16)),
        ((1, 9, 2, 3), (5, 7, 33, 40)),
        ((3, 7, 5, 2), (4, 4, 8, 4)),
        ((1, 41, 290, 3), (16, 35, 64, 24)),
        ((2, 4, 600, 1), (3, 96, 17, 33)),
    ],
    ids=str,
)
def test_stem(shape, dims):
    x, parameters = torch.randn(shape), make_stem(shape[-1], *dims)
    expected = exact_stem(x, parameters)
    assert relative_error(stem(x, *parameters), expected) < 2e-6
    permuted = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert relative_error(stem(permuted, *parameters), expected) < 2e-6


@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'shape, dims',
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 1, 6, 3), (8, 8, 32, 16)),
        ((1, 9, 2, 3), (5, 7, 33, 40)),
        ((1, 41, 290, 3), (32, 32, 64, 24)),
        ((2, 4, 600, 1), (3, 96, 17, 33)),
    ],
    ids=str,
)
def test_stem_in_bfloat16(shape, dims, weights):
    x, parameters = torch.randn(shape).bfloat16(), in_bfloat16(make_stem(shape[-1], *dims))
    result = stem(x, *(t.to(weights) for t in parameters))
    assert result.dtype == torch.bfloat16
    assert relative_error(result, exact_stem(x, parameters)) < 1e-2


# Whole tiles and panels of each instruction set, and what is left over; few pixels for the weights, and many.
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format], ids=['channels_last', 'contiguous'])
@pytest.mark.parametrize(
    'shape, inner, rank, hidden',
    [
        ((1, 1, 1, 1), 1, 1, 1),
        ((2, 5, 3, 7), 3, 1, 4),
        ((1, 64, 12, 24), 128, 4, 256),
        ((3, 33, 5, 10), 130, 3, 50),
        ((1, 130, 20, 15), 33, 9, 300),
        ((1, 300, 1, 5), 16, 5, 288),
        ((2, 16, 17, 17), 48, 1, 64),
    ],
    ids=str,
)
def test_block(shape, inner, rank, hidden, layout):
    x = torch.randn(shape).contiguous(memory_format=layout)
    parameters = make_block(shape[1], inner, rank, hidden)
    assert relative_error(block(x, parameters), exact_block(x, parameters)) < 1e-5


# Tiles of AMX have 16 rows, two of them at a time; panels 32 channels, of which 32 meet at once.
@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'shape, inner, rank, hidden',
    [
        ((1, 2, 2, 1), 3, 1, 5),
        ((2, 5, 3, 7), 3, 1, 4),
        ((2, 64, 9, 7), 128, 4, 256),
        ((1, 33, 4, 4), 70, 3, 50),
        ((1, 64, 4, 5), 64, 32, 95),
        ((3, 33, 5, 10), 130, 3, 50),
        ((1, 130, 20, 15), 33, 9, 300),
        ((1, 300, 1, 5), 16, 5, 288),
        ((1, 160, 30, 33), 48, 1, 64),
    ],
    ids=str,
)
def test_block_in_bfloat16(shape, inner, rank, hidden, weights):
    x = torch.randn(shape).bfloat16()
    parameters = make_block(shape[1], inner, rank, hidden)
    parameters = {name: p.to(weights) if isinstance(p, torch.Tensor) else p for name, p in parameters.items()}
    out = block(x, parameters)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact_block(x, parameters)) < 3e-2


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'op',
    [
        *('stem', 'stem with norms', 'downsample', 'block', 'block of other layout'),
        *('layer_norm_planes', 'layer_norm_planes of other layout'),
    ],
)
def test_opcheck(op, dtype):
    x, block_parameters = torch.randn(2, 5, 7, 6), make_block(6, 12, 2, 24).values()
    weights = make_stem(6, 4, 6, 16, 5)[::2]
    arguments = {
        'stem': (x, *without_norms(make_stem(6, 4, 6, 16, 5))),
        'block': (x.permute(0, 3, 1, 2), *block_parameters),
        'block of other layout': (x.permute(0, 3, 1, 2).contiguous(), *block_parameters),
        'downsample': (x, *without_norms(make_downsample(6, 32, 4))),
        'stem with norms': (x, *(part for w in weights for part in (w, None, make_norm(len(w)), 1.0))),
        'layer_norm_planes': (x.permute(0, 3, 1, 2), *torch.randn(2, 6), 1e-5),
        'layer_norm_planes of other layout': (x, *torch.randn(2, 5), 1e-5),
    }
    tests = ('test_schema', 'test_faketensor')
    name, (x, *parameters) = op.split()[0], arguments[op]
    function = getattr(torch.ops.mmspatialmamba_native, name).default
    torch.library.opcheck(function, (x.to(dtype), *parameters), test_utils=tests)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_special_values_stay_where_they_are_used(dtype):
    x = torch.randn(2, 9, 11, 8, dtype=dtype)
    x[1, 4, 4, 3] = torch.nan
    pixels = downsample(x, *make_downsample(8, 32, 4)).isnan().all(3).nonzero()
    assert pixels.tolist() == [[1, 2, 2]]
    planes = layer_norm_planes(x.permute(0, 3, 1, 2), torch.randn(8), torch.randn(8)).isnan()
    assert planes.all(1).nonzero().tolist() == [[1, 4, 4]] and planes.sum() == 8
    assert stem(x, *make_stem(8, 4, 6, 8, 4)).isnan().any(3).any(2).any(1).tolist() == [False, True]
    x, parameters = torch.randn(3, 40, 6, 30, dtype=dtype), make_block(40, 80, 3, 160)
    x[0, 3, 2, 2], x[2, 5, 3, 20] = torch.nan, torch.inf
    images = block(x, parameters).isfinite().all(1)
    assert images[1].all() and not images[0, 2, 2] and not images[2, 3, 20]


def test_products_in_turn_with_pytorchs():
    """AMX has to be set up for each."""
    x, weight, kernel = (
        torch.randn(1, 64, 20, 9).bfloat16(),
        torch.randn(96, 20, 9).bfloat16(),
        torch.randn(33, 64, 3, 3),
    )
    parameters = make_block(64, 70, 3, 90)
    calls = [
        lambda: F.linear(x.flatten(2), weight.flatten(1)),
        lambda: F.conv2d(x, kernel.bfloat16()),
        lambda: block(x, parameters),
    ]
    expected = [call() for call in calls]
    exact = (
        F.linear(x.flatten(2).double(), weight.flatten(1).double()),
        F.conv2d(x.double(), kernel.bfloat16().double()),
        exact_block(x, parameters),
    )
    for out, truth in zip(expected, exact):
        assert relative_error(out, truth) < 3e-2
    for i in (0, 2, 0, 2, 1, 2, 1, 0, 2, 2, 1):
        assert torch.equal(calls[i](), expected[i])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    maps, parameters = torch.randn(2, 41, 30, 8), make_downsample(8, 200, 16)
    stem_parameters = make_stem(8, 16, 16, 64, 24)
    x, block_parameters = torch.randn(2, 48, 20, 17), make_block(48, 96, 3, 192)
    maps, x = maps.to(dtype), x.to(dtype)
    few, norm = x[:, :, :2, :3], torch.randn(2, 48)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        layers = downsample(maps, *parameters), stem(maps, *stem_parameters)
        blocks = block(x, block_parameters), block(few, block_parameters)
        results.append((*layers, *blocks, layer_norm_planes(x, *norm)))
    torch.set_num_threads(before)
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


def test_norms_that_do_not_fit_are_refused():
    x, (weight, bias, _, _, *rest) = torch.randn(2, 5, 6, 8), without_norms(make_downsample(8, 32, 4))
    native = torch.ops.mmspatialmamba_native.downsample
    with pytest.raises(RuntimeError, match=r'downsample: a convolution.s bias must have shape \(32\), but has \[31\]'):
        native(x, weight, bias[1:], [], 0.0, *rest)
    with pytest.raises(RuntimeError, match=r'downsample: a norm.s tensors must have shape \(32\), but one has \[31\]'):
        native(x, weight, bias, [*make_norm(32)[:3], torch.rand(31)], 0.0, *rest)
    with pytest.raises(RuntimeError, match='downsample: a norm must have weight, bias, mean and variance, but has 3'):
        native(x, weight, bias, make_norm(32)[:3], 0.0, *rest)
    with pytest.raises(RuntimeError, match='downsample: weight1 must have at least one output channel'):
        downsample(x, *make_downsample(8, 0, 4))
    with pytest.raises(RuntimeError, match=r'layer_norm_planes: a norm.s weight and bias must have shape \(5\), but'):
        layer_norm_planes(x, torch.randn(5), torch.randn(4))
    with pytest.raises(RuntimeError, match='layer_norm_planes: x must be a float32 CPU tensor'):
        layer_norm_planes(x.half(), torch.randn(5), torch.randn(5))


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match='stem: x must be a float32 CPU tensor'):
        stem(torch.randn(1, 4, 4, 3).half(), *make_stem(3, 4, 4, 8, 4))


def test_shapes_that_do_not_fit_are_refused():
    x, (w1, b1, w2, *others) = torch.randn(2, 5, 6, 8), make_downsample(8, 32, 4)
    with pytest.raises(RuntimeError, match=r'downsample: x must have shape \(batch, height, width, channels\), but'):
        downsample(x[0], w1, b1, w2, *others)
    with pytest.raises(RuntimeError, match='downsample: the depthwise convolution must have 32 channels, but its'):
        downsample(x, w1, b1, w2[:31], *others)
    with pytest.raises(RuntimeError, match=r'downsample: weight must have shape \(out, 8\), but has \[32, 7\]'):
        downsample(x, w1[:, 1:], b1, w2, *others)
    parameters = make_stem(8, 4, 6, 16, 5)
    with pytest.raises(RuntimeError, match=r'stem: x must have shape \(batch, height, width, channels\), but'):
        stem(x[0], *parameters)
    with pytest.raises(RuntimeError, match=r'must have shape \(out, 6, 3, 3\), but has \[4, 5, 3, 3\]'):
        stem(x, *parameters[:4], parameters[4][:, 1:], *parameters[5:])
    with pytest.raises(RuntimeError, match='stem: weight3 must have 4 output channels, but has 3'):
        stem(x, *parameters[:4], *(t[:3] for t in parameters[4:6]), parameters[6][:, :3], *parameters[7:])


@pytest.mark.parametrize(
    'name, dim, message',
    [
        ('cpe1_bias', 0, r'depthwise_conv: bias must have shape \(6\), but has \[5\]'),
        ('ln1_weight', 0, r'block: a norm.s weight and bias must have shape \(6\), but one has \[5\]'),
        ('in_proj_weight', 0, 'block: the mixer.s parameters do not fit each other'),
        ('in_proj_weight', 1, r'block: weight must have shape \(out, 6\), but has \[12, 5\]'),
        ('conv_bias', 0, r'depthwise_conv: bias must have shape \(12\), but has \[11\]'),
        ('x_proj_weight', 0, 'block: the mixer.s parameters do not fit each other'),
        ('x_proj_weight', 1, r'block: weight must have shape \(out, 12\), but has \[4, 11\]'),
        ('dt_proj_weight', 0, 'block: the mixer.s parameters do not fit each other'),
        ('dt_bias', 0, 'block: the mixer.s parameters do not fit each other'),
        ('A_log', 0, 'block: the mixer.s parameters do not fit each other'),
        ('D', 0, 'block: the mixer.s parameters do not fit each other'),
        ('k3', 0, 'block: the mixer.s parameters do not fit each other'),
        ('alpha', 0, 'block: the mixer.s parameters do not fit each other'),
        ('out_norm_bias', 0, r'block: a norm.s weight and bias must have shape \(12\), but one has \[11\]'),
        ('out_proj_weight', 0, 'block: the last products must have 6 output channels as x has, but out_proj_weight'),
        ('fc1_bias', 0, r'block: bias must have shape \(24\), but has \[23\]'),
        ('fc2_weight', 0, 'block: the last products must have 6 output channels as x has, but out_proj_weight'),
        ('fc2_bias', 0, 'block: the last products must have 6 output channels as x has, but out_proj_weight'),
        ('fc2_weight', 1, r'block: weight must have shape \(out, 24\), but has \[6, 23\]'),
    ],
)
def test_parameters_of_a_block_that_do_not_fit_are_refused(name, dim, message):
    parameters = make_block(6, 12, 2, 24)
    parameters[name] = parameters[name].narrow(dim, 0, parameters[name].shape[dim] - 1)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match=message):
            block(torch.randn(2, 6, 3, 4, dtype=dtype), parameters)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_blocks_have_no_gradients(dtype):
    parameters = {name: p.requires_grad_() if torch.is_tensor(p) else p for name, p in make_block(6, 12, 2, 24).items()}
    with torch.enable_grad(), pytest.warns(UserWarning, match='autograd kernel was not registered'):
        block(torch.randn(2, 6, 3, 4, dtype=dtype), parameters).sum().backward()
    assert all(p.grad is None for p in parameters.values() if torch.is_tensor(p))


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, variable, value',
    [
        ('baseline', 'ATEN_CPU_CAPABILITY', 'default'),
        ('avx2', 'ATEN_CPU_CAPABILITY', 'avx2'),
        ('avx512', 'ATEN_CPU_CAPABILITY', 'avx512'),
        ('avx512_bf16', 'ONEDNN_MAX_CPU_ISA', 'AVX512_CORE_BF16'),
    ],
)
def test_on_other_instruction_sets(name, variable, value):
    environment = {**os.environ, variable: value}
    code = 'import torch; from mmspatialmamba import ops; print(torch.ops.mmspatialmamba_native.instruction_set())'
    chosen = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert chosen.returncode == 0, chosen.stderr[-3000:]
    if chosen.stdout.strip() != name:
        pytest.skip(f'needs a CPU with {name.upper()}')
    others = ('biased_gelu', 'depthwise_conv', 'gated_layer_norm', 'linear', 'state_fusion', 'structure_aware_scan')
    files = [__file__, *(f'{os.path.dirname(__file__)}/test_{op}.py' for op in others)]
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', *files]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
