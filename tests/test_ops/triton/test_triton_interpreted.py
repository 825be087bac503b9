"""The Triton backend in Triton's interpreter, against the float64 truth: see conftest.py for where it runs."""

import sys

import pytest
import torch
from test_ops.test_derivatives import make, second
from test_ops.triton.cases import (
    INTERPRETED,
    check_against_truth,
    fused_inputs,
    fused_truth,
    fusion_inputs,
    fusion_truth,
    scan_inputs,
    scan_truth,
    triton_ops,
)
from test_ops.truth import relative_error

from mmspatialmamba.ops import use_backend

if INTERPRETED:
    ops = triton_ops()

pytestmark = [pytest.mark.slow, pytest.mark.interpreted, pytest.mark.usefixtures('poisoned_memory')]

SHAPES = [(1, 1), (1, 40), (40, 1), (6, 5), (13, 15)]
FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
HALVES = pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])


def check_fused(inputs, softplus=True):
    functions = (ops.structure_aware_scan, ops.structure_aware_scan_backward, fused_truth)
    return check_against_truth(*functions, inputs, (softplus,))


def check_scan(inputs, softplus=True):
    functions = (ops.selective_scan, ops.selective_scan_backward, scan_truth)
    return check_against_truth(*functions, inputs, (softplus,), saves_output=True)


def check_fusion(inputs):
    return check_against_truth(ops.state_fusion, ops.state_fusion_backward, fusion_truth, inputs)


@FORMATS
@pytest.mark.parametrize('height, width', SHAPES, ids=lambda size: str(size))
def test_fused_op(height, width, memory_format):
    inputs = fused_inputs(2 if height == 6 else 1, 2, height, width, memory_format=memory_format)
    out, grads = check_fused(inputs)
    assert out.dtype == torch.float32
    for x in (out, *grads[:2]):
        assert x.is_contiguous(memory_format=memory_format)


@FORMATS
def test_several_blocks_of_channels(memory_format):
    check_fused(fused_inputs(1, 33 if memory_format == torch.channels_last else 9, 2, 2, memory_format=memory_format))


@pytest.mark.parametrize('softplus', [True, False], ids=['softplus', 'no softplus'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_bias_and_softplus_are_optional(bias, softplus):
    inputs = fused_inputs(1, 3, 4, 5)
    if not bias:
        inputs['delta_bias'] = None
    if not softplus:
        inputs['delta'] = inputs['delta'].abs()
        inputs['delta_bias'] = None if not bias else inputs['delta_bias'].abs()
    check_fused(inputs, softplus)


@HALVES
def test_half_precision_inputs(dtype):
    out, _ = check_fused(fused_inputs(1, 3, 5, 4, dtype, torch.channels_last))
    assert out.dtype == dtype


def test_dtypes_may_differ():
    inputs = fused_inputs(1, 3, 5, 4, torch.bfloat16)
    inputs |= {'delta': inputs['delta'].float(), 'C': inputs['C'].half(), 'D': inputs['D'].half()}
    inputs |= {name: inputs[name].bfloat16() for name in ('A', 'k3', 'alpha', 'delta_bias')}
    check_fused(inputs)


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr('mmspatialmamba.ops.triton_tiles.INT32_OFFSETS', 0)
    check_fused(fused_inputs(2, 3, 4, 5))


def test_any_strides():
    inputs = fused_inputs(2, 3, 4, 6)
    inputs['u'] = inputs['u'].transpose(1, 2).contiguous().transpose(1, 2)
    inputs['delta'] = inputs['delta'].repeat(1, 2, 1, 1)[:, ::2]
    inputs['B'] = inputs['B'].expand(2, 3, 4, 6)[:, 1:2].transpose(2, 3).contiguous().transpose(2, 3)
    inputs['C'] = inputs['C'][:, :, :1].expand(2, 1, 4, 6)
    inputs['D'] = inputs['D'].repeat_interleave(2)[::2]
    check_fused(inputs)


@pytest.mark.parametrize('state', [1, 3])
@pytest.mark.parametrize('layout', ['pixels last', 'channels last'])
def test_selective_scan(state, layout):
    inputs = scan_inputs(2, 3, state, 45)
    if layout == 'channels last':
        inputs |= {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ('u', 'delta')}
    out, grads = check_scan(inputs)
    assert out.is_contiguous()
    assert [g.stride() for g in grads[:2]] == [inputs['u'].stride()] * 2


@pytest.mark.parametrize('programs', [1, 3], ids=['one chunk', 'chunks of two tiles'])
@pytest.mark.parametrize('layout', ['pixels last', 'channels last'])
def test_chunks_of_several_tiles(layout, programs, monkeypatch):
    # The attribute of ops of that name is the function.
    monkeypatch.setattr(sys.modules['mmspatialmamba.ops.selective_scan.triton'], '_PROGRAMS', programs)
    inputs = scan_inputs(1, 2, 1, 150) if layout == 'channels last' else scan_inputs(1, 1, 2, 600)
    if layout == 'channels last':
        inputs |= {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ('u', 'delta')}
    check_scan(inputs)


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_selective_scan_without_softplus(bias):
    inputs = scan_inputs(1, 2, 3, 7)
    inputs['delta'].abs_()
    inputs['delta_bias'] = inputs['delta_bias'].abs() if bias else None
    check_scan(inputs, softplus=False)


@HALVES
def test_selective_scan_in_half_precision(dtype):
    out, _ = check_scan(scan_inputs(1, 2, 3, 9, dtype))
    assert out.dtype == torch.float32


@FORMATS
@pytest.mark.parametrize('height, width', [(1, 1), (1, 7), (6, 5)], ids=lambda size: str(size))
def test_state_fusion(height, width, memory_format):
    out, grads = check_fusion(fusion_inputs(1, 3, height, width, memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)
    assert grads[0].is_contiguous(memory_format=memory_format)


@HALVES
def test_state_fusion_in_half_precision(dtype):
    out, _ = check_fusion(fusion_inputs(1, 2, 3, 4, dtype))
    assert out.dtype == torch.float32


def test_softplus_is_relatively_accurate():
    delta = torch.linspace(-80, 80, 321)
    ones = torch.ones(1, 321, 1)
    # From a zero state, a sequence of one pixel: h is the time step.
    step = ops.selective_scan(ones, delta.view(1, -1, 1), -ones[0], ones[:, :1], None, True).flatten()
    expected = torch.log1p(torch.exp(delta.double()))
    error = (step.double() - expected).abs() / expected
    # An exponential function turns its argument's rounding into a relative error as large as the argument.
    assert (error < 2**-24 * (4 + delta.abs())).all()


def test_extreme_inputs_stay_finite():
    inputs = fused_inputs(1, 6, 4, 5)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    inputs['delta'] = torch.linspace(-100, 100, 120)[order].view(1, 6, 4, 5)
    inputs['A'] = -torch.logspace(-6, 4, 6).view(6, 1)
    inputs['u'][:, :, 2] = 0
    out, grads = check_fused(inputs)
    for x in (out, *grads):
        assert x.isfinite().all()


@FORMATS
def test_nan_stays_in_its_channel(memory_format):
    inputs = fused_inputs(1, 4, 2, 3, memory_format=memory_format)
    inputs['u'][0, 2, 1, 1] = float('nan')
    clean = inputs | {'u': inputs['u'].nan_to_num()}
    outputs = []
    for case in (inputs, clean):
        case = [*case.values(), True]
        outputs.append([ops.structure_aware_scan(*case), *ops.structure_aware_scan_backward(case[0] * 0 + 1, *case)])
    others = [0, 1, 3]
    for i, (value, expected) in enumerate(zip(*outputs)):
        if i in (0, 1, 2):
            assert torch.equal(value[:, others], expected[:, others])
    assert outputs[0][0][0, 2].isnan().any()


@pytest.mark.parametrize('op', ['selective_scan', 'state_fusion', 'structure_aware_scan'])
def test_second_derivatives(op):
    with use_backend('torch'):
        expected, _ = second(*make(op, torch.float64))
    with use_backend('triton'):
        found = second(*make(op, torch.float32))
    for products in found:
        for value, truth in zip(products, expected):
            assert relative_error(value, truth) < 1e-4
