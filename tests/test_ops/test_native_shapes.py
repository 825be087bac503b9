"""The compiled ops read tensors by pointers, so they refuse what does not fit, naming themselves and the argument.

The checks of an op are in csrc/<op>/bind.cpp, made of those in csrc/common/checks.h. They come first, are the same for
CPU and CUDA tensors, and do not depend on the device: what is tested here on the CPU guards the CUDA kernels too.
"""

import pytest
import torch

from mmspatialmamba import ops

pytestmark = pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')

MAP, KERNEL, CHANNELS = (2, 16, 5, 6), (16, 1, 3, 3), (16,)
ROWS, SEQUENCE, STATES = (2, 7, 16), (2, 16, 9), (2, 16, 3, 9)
FUSION = {'k1': KERNEL, 'k3': KERNEL, 'k5': KERNEL, 'alpha': (3,)}
SCAN = {'u': MAP, 'delta': MAP, 'A': (16, 1), 'B': (2, 1, 5, 6), 'C': (2, 1, 5, 6), 'D': CHANNELS}
SCAN = {**SCAN, **FUSION, 'delta_bias': CHANNELS}
SELECTIVE = {'u': SEQUENCE, 'delta': SEQUENCE, 'A': (16, 3), 'B': (2, 3, 9), 'delta_bias': CHANNELS}
CONV = {'x': MAP, 'weight': KERNEL, 'bias': CHANNELS}
NORM = {'x': ROWS, 'gate': ROWS, 'weight': CHANNELS, 'bias': CHANNELS}
# The shape of each tensor argument, and the arguments behind them.
CALLS = {
    'selective_scan': (SELECTIVE, [True]),
    'selective_scan_backward': ({'grad': STATES, 'h': STATES, **SELECTIVE}, [True]),
    'state_fusion': ({'h': MAP, **FUSION}, []),
    'state_fusion_backward': ({'grad': MAP, 'h': MAP, **FUSION}, []),
    'structure_aware_scan': (SCAN, [True]),
    'structure_aware_scan_backward': ({'grad': MAP, **SCAN}, [True]),
    'depthwise_conv': (CONV, ['silu']),
    'depthwise_conv_backward': ({'grad': MAP, **CONV}, ['silu']),
    'gated_layer_norm': (NORM, [1e-5]),
    'gated_layer_norm_backward': ({'grad': ROWS, **NORM}, [1e-5]),
}
# What the shapes of other arguments follow from, the first also their device: the others are named in its place.
REFERENCES = {'selective_scan': 'uA', 'structure_aware_scan': 'u', 'state_fusion': 'h'}
ARGUMENTS = [(op, name) for op, (shapes, _) in CALLS.items() for name in shapes]
each_argument = pytest.mark.parametrize('op, name', ARGUMENTS, ids=[f'{op}-{name}' for op, name in ARGUMENTS])


def arguments(op):
    return {name: torch.rand(shape) for name, shape in CALLS[op][0].items()}


def call(op, tensors):
    """Run the CPU kernel, whatever devices the tensors are on.

    By itself the dispatcher takes a meta tensor among CPU ones to the op's fake. ``_op_dk``, tried on torch 2.14, calls
    the kernel of a dispatch key; torch has no public way to do so.
    """
    run = getattr(torch.ops.mmspatialmamba_native, op).default._op_dk
    return run(torch._C.DispatchKey.CPU, *tensors.values(), *CALLS[op][1])


def references(op):
    return REFERENCES.get(op.removesuffix('_backward'), 'x')


def refuses(op, tensors, named, message):
    with pytest.raises(RuntimeError, match=f'^{op}: {named} must {message}'):
        call(op, tensors)


@pytest.mark.parametrize('op', CALLS)
def test_right_arguments_are_taken(op):
    results = call(op, arguments(op))
    for result in results if isinstance(results, tuple) else [results]:
        assert result.isfinite().all()


@each_argument
def test_a_wrong_shape_is_refused(op, name):
    right = arguments(op)[name]
    is_reference = name in references(op)
    # Nothing else has the height and the width of a convolution's input, for instance.
    dims = [1] if is_reference else range(right.dim())
    wrong = [right.narrow(dim, 0, right.shape[dim] - 1) for dim in dims]
    wrong += [right.unsqueeze(0), right.unsqueeze(-1), right[0]]
    for value in wrong:
        refuses(op, {**arguments(op), name: value}, r'\w+' if is_reference else name, 'have')


@each_argument
@pytest.mark.parametrize('dtype', [torch.float64, torch.int64, torch.bool], ids=str)
def test_a_wrong_dtype_is_refused(op, name, dtype):
    tensors = arguments(op)
    tensors[name] = tensors[name].to(dtype)
    refuses(op, tensors, name, 'be float32, bfloat16 or float16 on the native backend, but is')


@each_argument
def test_a_wrong_device_is_refused(op, name):
    tensors = arguments(op)
    tensors[name] = tensors[name].to('meta')
    if name == references(op)[0]:
        refuses(op, tensors, r'\w+', f'be on meta as {name} is, but is on cpu')
    else:
        refuses(op, tensors, name, f'be on cpu as {references(op)[0]} is, but is on meta')


@each_argument
def test_a_tensor_without_strides_is_refused(op, name):
    tensors = arguments(op)
    tensors[name] = tensors[name].to_sparse()
    refuses(op, tensors, name, 'be a strided tensor, but its layout is Sparse')


@each_argument
def test_strides_are_followed(op, name):
    tensors = arguments(op)
    expected = call(op, tensors)
    value = tensors[name]
    tensors[name] = torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
    torch.testing.assert_close(call(op, tensors), expected)


@pytest.mark.parametrize('op', [op for op in CALLS if op.endswith('backward')])
def test_empty_maps_have_gradients_of_zero(op):
    """Memory that nobody wrote would be NaN."""
    tensors = {name: t.narrow(0, 0, 0) if t.shape[0] == 2 and t.dim() > 1 else t for name, t in arguments(op).items()}
    torch.use_deterministic_algorithms(True)
    try:
        gradients = call(op, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(gradient.count_nonzero() for gradient in gradients)


def test_one_table_of_taps():
    from mmspatialmamba.ops.state_fusion.taps import TAPS

    offsets = torch.ops.mmspatialmamba_native.taps()
    assert list(zip(offsets[::2], offsets[1::2])) == [tuple(tap) for tap in TAPS]
