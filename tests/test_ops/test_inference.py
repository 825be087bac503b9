from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_ops.truth import relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmspatialmamba import ops
from mmspatialmamba.ops.inference import downsample, fuses_layers, gated_output, norm_linear, norm_mlp

pytestmark = [
    pytest.mark.usefixtures('poisoned_memory'),
    pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops'),
]
# Rows, channels in, channels out: whole tiles and panels of each instruction set, and what is left over.
SIZES = [(1, 1, 1), (7, 5, 3), (48, 64, 64), (50, 130, 33), (300, 33, 130), (5, 300, 16), (289, 16, 48)]


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def make_norm(channels):
    norm = nn.LayerNorm(channels)
    norm.weight.normal_()
    norm.bias.normal_()
    return norm


def make_weight(*shape):
    return torch.randn(shape) / shape[1] ** 0.5


def exact(norm, x):
    return F.layer_norm(x.double(), x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)


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


def test_downsampled_in_parts():
    """What lies between the last two convolutions is more than is kept at a time, within an image and over images."""
    for shape in ((1, 300, 600, 2), (5, 120, 200, 2)):
        x, parameters = torch.randn(shape), make_downsample(2, 200, 3)
        assert relative_error(downsample(x, *parameters), exact_downsample(x, parameters)) < 2e-6


@pytest.mark.parametrize('rows, channels, out', SIZES)
def test_norm_linear(rows, channels, out):
    x, norm, weight = 3 + torch.randn(rows, channels), make_norm(channels), make_weight(out, channels)
    assert relative_error(norm_linear(x, norm, weight), F.linear(exact(norm, x), weight.double())) < 5e-6


@pytest.mark.parametrize('rows, channels, inner', SIZES)
def test_gated_output(rows, channels, inner):
    x, y = torch.randn(rows, channels), torch.randn(rows, inner)
    norm, out_norm = make_norm(channels), make_norm(inner)
    gate_weight, weight = make_weight(inner, channels), make_weight(channels, inner)
    gate = F.linear(exact(norm, x), gate_weight.double())
    expected = x + F.linear(exact(out_norm, y) * F.silu(gate), weight.double())
    assert relative_error(gated_output(y, x, norm, gate_weight, out_norm, weight), expected) < 5e-6


@pytest.mark.parametrize('rows, channels, hidden', SIZES)
def test_norm_mlp(rows, channels, hidden):
    x, norm = torch.randn(rows, channels), make_norm(channels)
    weights = make_weight(hidden, channels), torch.randn(hidden), make_weight(channels, hidden), torch.randn(channels)
    w1, b1, w2, b2 = (t.double() for t in weights)
    expected = x + F.linear(F.gelu(F.linear(exact(norm, x), w1, b1)), w2, b2)
    assert relative_error(norm_mlp(x, norm, *weights), expected) < 5e-6


def test_special_values_stay_in_their_row():
    x = torch.randn(60, 40)
    x[7, 3], x[20, 5] = torch.nan, torch.inf
    norm, weights = make_norm(40), (make_weight(160, 40), torch.randn(160), make_weight(40, 160), torch.randn(40))
    rows = ~norm_mlp(x, norm, *weights).isfinite().all(1)
    assert rows.nonzero().flatten().tolist() == [7, 20]
    x = torch.randn(2, 9, 11, 8)
    x[1, 4, 4, 3] = torch.nan
    pixels = downsample(x, *make_downsample(8, 32, 4)).isnan().all(3).nonzero()
    assert pixels.tolist() == [[1, 2, 2]]


def test_results_do_not_depend_on_the_number_of_threads():
    x, norm = torch.randn(500, 48), make_norm(48)
    weights = make_weight(192, 48), torch.randn(192), make_weight(48, 192), torch.randn(48)
    maps, parameters = torch.randn(2, 41, 30, 8), make_downsample(8, 200, 16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((norm_mlp(x, norm, *weights), downsample(maps, *parameters)))
    torch.set_num_threads(before)
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match='norm_linear: x must be a float32 CPU tensor'):
        norm_linear(torch.randn(2, 3).bfloat16(), make_norm(3), torch.randn(4, 3))


def test_shapes_that_do_not_fit_are_refused():
    x, (w1, b1, w2, *others) = torch.randn(2, 5, 6, 8), make_downsample(8, 32, 4)
    with pytest.raises(RuntimeError, match=r'downsample: x must have shape \(batch, height, width, channels\), but'):
        downsample(x[0], w1, b1, w2, *others)
    with pytest.raises(RuntimeError, match='downsample: the depthwise convolution must have 32 channels, but its'):
        downsample(x, w1, b1, w2[:31], *others)
    with pytest.raises(RuntimeError, match=r'downsample: weight must have shape \(out, 8\), but has \[32, 7\]'):
        downsample(x, w1[:, 1:], b1, w2, *others)
    with pytest.raises(RuntimeError, match=r'norm_linear: weight must have shape \(out, 3\), but has \[4, 2\]'):
        norm_linear(torch.randn(2, 3), make_norm(3), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match=r'norm_linear: a norm.s weight and bias must have shape \(3\), but one'):
        norm_linear(torch.randn(2, 3), make_norm(4), torch.randn(4, 3))
    weights = make_weight(8, 4), torch.randn(8), make_weight(5, 8), torch.randn(5)
    with pytest.raises(RuntimeError, match='norm_mlp: weight2 must have 4 rows, but has 5'):
        norm_mlp(torch.randn(2, 4), make_norm(4), *weights)
    with pytest.raises(RuntimeError, match=r'gated_output: shapes do not fit: x \[3, 4\], y \[2, 8\], '):
        gated_output(
            torch.randn(2, 8), torch.randn(3, 4), make_norm(4), make_weight(8, 4), make_norm(8), make_weight(4, 8)
        )


def test_when_layers_are_fused():
    x = torch.randn(2)
    assert fuses_layers(x) == (torch.ops.mmspatialmamba_native.instruction_set() != 'baseline')
    assert not fuses_layers(x.double()) and not fuses_layers(x.bfloat16())
    with torch.enable_grad():
        assert not fuses_layers(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert not fuses_layers(x)
    with ops.use_backend('torch'):
        assert not fuses_layers(x)


def test_counted():
    norm, x = nn.LayerNorm(8), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        norm_mlp(x, norm, torch.randn(32, 8), torch.randn(32), torch.randn(8, 32), torch.randn(8))
    assert counter.get_total_flops() == 2 * 5 * 2 * 8 * 32
    with FlopCounterMode(display=False) as counter:
        downsample(torch.randn(1, 5, 7, 8), *make_downsample(8, 32, 6))
    assert counter.get_total_flops() == 2 * (5 * 7 * 8 * 32 + 3 * 4 * 32 * (9 + 6))


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['default', 'avx2', 'avx512'])
def test_on_other_instruction_sets(capability):
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability}
    if capability != 'default' and capability.upper() not in torch.backends.cpu.get_cpu_capability():
        pytest.skip(f'needs a CPU with {capability.upper()}')
    others = ('biased_gelu', 'gated_layer_norm', 'linear')
    files = [__file__, *(f'{os.path.dirname(__file__)}/test_{op}.py' for op in others)]
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', *files]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
