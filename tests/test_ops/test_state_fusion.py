import pytest
import torch
from test_ops.truth import dilated_convolutions, relative_error

from mmspatialmamba.ops import state_fusion

pytestmark = pytest.mark.usefixtures('poisoned_memory')

KERNELS = ('kernel_3', 'kernel_3_1', 'kernel_3_2')


def make_inputs(batch, dim, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * 100 + width)
    shapes = [(batch, dim, height, width), *[(dim, 1, 3, 3)] * 3, (3,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize('name', ['map', 'one', 'thin', 'wide'])
def test_equals_reference(backend, goldens, name):
    names = ('h', *KERNELS, 'alpha')
    leaves = [goldens[f'fusion/{name}/in/{n}'].clone().requires_grad_() for n in names]
    out = state_fusion(leaves[0], leaves[1:4], leaves[4])
    assert relative_error(out, goldens[f'fusion/{name}/out']) < 1e-6
    out.backward(goldens[f'fusion/{name}/grad_out'])
    for n, leaf in zip(names, leaves):
        assert relative_error(leaf.grad, goldens[f'fusion/{name}/grad/{n}']) < 2e-6, n


@pytest.mark.parametrize('height, width', [(1, 1), (1, 9), (2, 3), (5, 5), (7, 16), (15, 30), (31, 11)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_forward_and_gradients_equal_dilated_convolutions(backend, height, width, memory_format):
    inputs = make_inputs(2, 4, height, width)
    leaves = [t.clone().requires_grad_() for t in inputs]
    truth_leaves = [t.double().requires_grad_() for t in inputs]
    out = state_fusion(leaves[0].contiguous(memory_format=memory_format), leaves[1:4], leaves[4])
    truth = dilated_convolutions(truth_leaves[0], truth_leaves[1:4], truth_leaves[4])
    assert relative_error(out, truth) < 1e-6
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad_out)
    truth.backward(grad_out.double())
    for leaf, truth_leaf in zip(leaves, truth_leaves):
        assert relative_error(leaf.grad, truth_leaf.grad) < 5e-6


def test_float64_gradients():
    leaves = [t.requires_grad_() for t in make_inputs(1, 2, 4, 7, torch.float64)]
    assert torch.autograd.gradcheck(lambda h, *k: state_fusion(h, k[:3], k[3]), leaves)
    assert torch.autograd.gradgradcheck(lambda h, *k: state_fusion(h, k[:3], k[3]), leaves, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(backend, dtype):
    h, *kernels, alpha = make_inputs(1, 3, 9, 8, dtype)
    out = state_fusion(h, kernels, alpha)
    assert out.dtype == torch.float32
    truth = dilated_convolutions(h.double(), [k.double() for k in kernels], alpha.double())
    assert relative_error(out, truth) < 1e-6


def test_bad_input_is_named():
    h, *kernels, alpha = make_inputs(1, 3, 9, 8)
    with pytest.raises(ValueError, match=r'state_fusion: kernels must be three tensors, .* are 2'):
        state_fusion(h, kernels[:2], alpha)
    with pytest.raises(ValueError, match=r'state_fusion: kernels\[0\] must have the shape \(2, 1, 3, 3\)'):
        state_fusion(h[:, :2], kernels, alpha)
    with pytest.raises(ValueError, match=r'state_fusion: alpha must have the shape \(3\)'):
        state_fusion(h, kernels, alpha[:2])
