"""The Triton backend on a GPU, against the float64 truth; needs torch, triton and pytest only."""

import pytest
import torch
from test_ops.triton.cases import (
    FUSED_NAMES,
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

HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA GPU')]

if HAS_GPU:
    ops = triton_ops()

FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    'shape',
    [(1, 1, 1, 1), (2, 7, 1, 300), (2, 7, 300, 1), (2, 128, 56, 56), (1, 40, 37, 61), (3, 1024, 7, 7), (70, 33, 6, 5)],
    ids=str,
)


@FORMATS
@DTYPES
@SHAPES
def test_fused_op(shape, dtype, memory_format):
    check_against_truth(
        ops.structure_aware_scan,
        ops.structure_aware_scan_backward,
        fused_truth,
        fused_inputs(*shape, dtype, memory_format, 'cuda'),
        (True,),
    )


@DTYPES
@pytest.mark.parametrize('state', [1, 3, 16])
def test_selective_scan(state, dtype):
    check_against_truth(
        ops.selective_scan,
        ops.selective_scan_backward,
        scan_truth,
        scan_inputs(2, 70, state, 2500, dtype, 'cuda'),
        (True,),
        saves_output=True,
    )


@FORMATS
@DTYPES
def test_state_fusion(dtype, memory_format):
    inputs = fusion_inputs(2, 70, 41, 50, dtype, memory_format, 'cuda')
    check_against_truth(ops.state_fusion, ops.state_fusion_backward, fusion_truth, inputs)


@FORMATS
def test_gradients_are_deterministic(memory_format):
    inputs = [*fused_inputs(2, 96, 56, 57, memory_format=memory_format, device='cuda').values(), True]
    grads = [ops.structure_aware_scan_backward(inputs[0], *inputs) for _ in range(2)]
    for name, first, second in zip(FUSED_NAMES, *grads):
        assert torch.equal(first, second), name


@pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_properties(0).total_memory < 60e9, reason='needs a GPU with 60 GB of memory'
)
def test_more_than_2_to_the_31_elements():
    inputs = fused_inputs(1, 1, 1, 1, torch.bfloat16, device='cuda')
    dim, height, width = 65, 8192, 4096
    generator = torch.Generator('cuda').manual_seed(0)
    for name, channels in (('u', dim), ('delta', dim), ('B', 1), ('C', 1)):
        shape = (1, channels, height, width)
        inputs[name] = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device='cuda')
    for name in ('A', 'D', 'k1', 'k3', 'k5', 'delta_bias'):
        inputs[name] = inputs[name].expand(dim, *inputs[name].shape[1:])
    last = {name: x[-1:] if x.shape[0] == dim else x for name, x in inputs.items()}
    last |= {name: inputs[name][:, -1:] for name in ('u', 'delta')}
    out = ops.structure_aware_scan(*inputs.values(), True)[:, -1:]
    assert relative_error(out, ops.structure_aware_scan(*last.values(), True)) < 2**-7
    del out
    torch.cuda.empty_cache()
    grads = ops.structure_aware_scan_backward(inputs['u'], *inputs.values(), True)
    last_grads = ops.structure_aware_scan_backward(last['u'], *last.values(), True)
    for i in range(2):
        assert relative_error(grads[i][:, -1:], last_grads[i]) < 2**-7, FUSED_NAMES[i]
