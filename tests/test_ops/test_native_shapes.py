"""What the compiled CPU ops are called with by hand must fit, as they read it by pointers."""

import pytest
import torch

from mmspatialmamba import ops

pytestmark = pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')

MAP, KERNEL, CHANNELS = (2, 16, 5, 6), (16, 1, 3, 3), (16,)
ROWS, SEQUENCE, STATES = (2, 7, 16), (2, 16, 9), (2, 16, 3, 9)
FUSION = [KERNEL] * 3 + [(3,)]
SCAN = [MAP, MAP, (16, 1), (2, 1, 5, 6), (2, 1, 5, 6), CHANNELS, *FUSION, CHANNELS]
CALLS = {
    'selective_scan_backward': ([STATES, STATES, SEQUENCE, SEQUENCE, (16, 3), (2, 3, 9), CHANNELS], [True], (0, 1)),
    'state_fusion_backward': ([MAP, MAP, *FUSION], [], (0,)),
    'structure_aware_scan_backward': ([MAP, *SCAN], [True], (0,)),
    'depthwise_conv_backward': ([MAP, MAP, KERNEL, CHANNELS], ['silu'], (0,)),
    'downsampling_conv_backward': ([(2, 16, 3, 3), (2, 16, 3, 3), MAP, KERNEL, CHANNELS], [], (0, 1)),
    'gated_layer_norm': ([ROWS, ROWS, CHANNELS, CHANNELS], [1e-5], (1,)),
    'gated_layer_norm_backward': ([ROWS, ROWS, ROWS, CHANNELS, CHANNELS], [1e-5], (0, 2)),
    'biased_gelu_backward': ([ROWS, ROWS, CHANNELS], [], (0,)),
}


@pytest.mark.parametrize('name, index', [(name, i) for name, (*_, indices) in CALLS.items() for i in indices])
def test_a_tensor_of_another_shape_is_refused(name, index):
    shapes, others, _ = CALLS[name]
    op = getattr(torch.ops.mmspatialmamba_native, name)
    tensors = [torch.rand(shape) for shape in shapes]
    op(*tensors, *others)
    right = tensors[index]
    for wrong in (*(right.narrow(dim, 0, size - 1) for dim, size in enumerate(right.shape)), right.unsqueeze(0)):
        tensors[index] = wrong
        with pytest.raises(RuntimeError, match=f'{name.removesuffix("_backward")}: .* must (have|be)'):
            op(*tensors, *others)


@pytest.mark.parametrize('indices', [(0, 1), (2,)], ids=['u-and-delta', 'A'])
def test_more_dimensions_are_refused(indices):
    tensors = [torch.rand(shape) for shape in (SEQUENCE, SEQUENCE, (16, 3), (2, 3, 9), CHANNELS)]
    for index in indices:
        tensors[index] = tensors[index].unsqueeze(-1)
    with pytest.raises(RuntimeError, match='selective_scan: u must have 3 dimensions and A 2'):
        torch.ops.mmspatialmamba_native.selective_scan(*tensors, True)
