"""The native backend on a GPU, against the float64 truth."""

import pytest
import torch
from test_ops.truth import dilated_convolutions, relative_error

from mmspatialmamba.ops import selective_scan, state_fusion, structure_aware_scan, use_backend
from mmspatialmamba.ops.dispatch import why_unusable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
]

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'kernel1', 'kernel3', 'kernel5', 'alpha', 'delta_bias')
FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
# A result in half precision is rounded once; everything before is float32.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize('dtype', list(BOUNDS), ids=str)
MEMORY_FORMATS = pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def native():
    """Runs the ops on the native backend, in memory that starts as NaN."""
    reason = why_unusable('native', 'cuda')
    assert reason is None, reason
    torch.use_deterministic_algorithms(True)
    with use_backend('native'):
        yield
    torch.use_deterministic_algorithms(False)


def make_inputs(batch, dim, height, width, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator('cuda').manual_seed(height * 1000 + width)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device='cuda')

    maps = [randn(batch, dim, height, width).to(dtype).contiguous(memory_format=memory_format) for _ in range(2)]
    B, C = (randn(batch, 1, height, width).to(dtype) for _ in range(2))
    kernels = [randn(dim, 1, 3, 3) for _ in range(3)]
    return [*maps, -randn(dim, 1).exp(), B, C, randn(dim), *kernels, randn(3), randn(dim)]


def run(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    return structure_aware_scan(u, delta, A, B, C, D, (k1, k3, k5), alpha, delta_bias)


class Recurrence(torch.autograd.Function):
    """h_t = decay_t * h_(t-1) + drive_t over the last dimension, on the CPU, where a step costs no launch."""

    @staticmethod
    def forward(ctx, decay, drive):
        decays, drives = (t.movedim(-1, 0).cpu().contiguous() for t in (decay, drive))
        h, state = torch.empty_like(drives), torch.zeros_like(drives[0])
        for t in range(len(h)):
            state = torch.addcmul(drives[t], decays[t], state, out=h[t])
        ctx.save_for_backward(decays, h)
        return h.movedim(0, -1).to(drive.device)

    @staticmethod
    def backward(ctx, grad):
        decays, h = ctx.saved_tensors
        total = grad.movedim(-1, 0).cpu().contiguous()
        for t in reversed(range(len(h) - 1)):
            total[t].addcmul_(decays[t + 1], total[t + 1])
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        return tuple(t.movedim(0, -1).to(grad.device) for t in (total * before, total))


def true_states(u, delta, A, B, bias):
    """States (batch, dim, state, length)."""
    delta = delta + bias.unsqueeze(-1)
    dt = torch.logaddexp(delta, torch.zeros_like(delta)).unsqueeze(2)
    decay = torch.exp(dt * A.unsqueeze(-1))
    drive = dt * B.unsqueeze(1) * u.unsqueeze(2)
    return Recurrence.apply(decay, drive)


def true_scan(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    h = true_states(u.flatten(2), delta.flatten(2), A, B.flatten(2), delta_bias)[:, :, 0].view(u.shape)
    return C * dilated_convolutions(h, (k1, k3, k5), alpha) + D.view(-1, 1, 1) * u


def check(function, truth, inputs, names):
    """Output and gradients of ``function`` equal those of ``truth``, and are the same bits in a second run."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    grad_out = torch.randn(out.shape, generator=torch.Generator('cuda').manual_seed(1), device='cuda').to(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    true_leaves = [t.detach().double().requires_grad_() for t in inputs]
    true_out = truth(*true_leaves)
    true_grads = torch.autograd.grad(true_out, true_leaves, grad_out.double())
    assert relative_error(out, true_out) < BOUNDS[out.dtype]
    for name, leaf, grad, true_grad in zip(names, leaves, grads, true_grads):
        assert grad.dtype == leaf.dtype, name
        assert relative_error(grad, true_grad) < BOUNDS[leaf.dtype], name
    again = function(*leaves)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    for grad, repeated in zip(grads, torch.autograd.grad(again, leaves, grad_out)):
        torch.testing.assert_close(repeated, grad, rtol=0, atol=0)
    return out


@pytest.mark.parametrize('height, width', [(1, 1), (1, 40), (40, 1), (6, 5), (17, 23)], ids=str)
@MEMORY_FORMATS
@DTYPES
def test_structure_aware_scan_on_small_maps(height, width, memory_format, dtype):
    inputs = make_inputs(2, 11, height, width, dtype, memory_format)
    out = check(run, true_scan, inputs, NAMES)
    assert out.dtype == dtype


# Batch 1 with 128 channels is cut into chunks of rows; 40 maps of 16 channels are not; widths above 128 into tiles.
@pytest.mark.parametrize(
    'shape',
    [(1, 128, 56, 56), (1, 128, 128, 128), (160, 16, 14, 14), (2, 24, 3, 1100), (1, 40, 200, 304), (1, 1, 7, 5000)],
    ids=lambda shape: 'x'.join(map(str, shape)),
)
@MEMORY_FORMATS
@DTYPES
def test_structure_aware_scan_on_large_maps(shape, memory_format, dtype):
    check(run, true_scan, make_inputs(*shape, dtype, memory_format), NAMES)


def test_views_and_mixed_dtypes():
    u, delta, *others = make_inputs(2, 16, 9, 8)
    u = torch.cat([torch.full_like(u, torch.nan), u], 1).contiguous(memory_format=torch.channels_last)[:, 16:]
    delta = delta.transpose(2, 3).contiguous().transpose(2, 3).bfloat16()
    check(run, true_scan, [u, delta, *others], NAMES)


def test_non_default_stream():
    inputs = make_inputs(1, 128, 64, 64, torch.bfloat16, torch.channels_last)
    expected = run(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [t + 0 for t in inputs]
        out = run(*late)
    assert not stream.query(), 'the op waited for the device'
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside(dtype):
    leaves = [t.requires_grad_() for t in make_inputs(2, 16, 9, 8)]
    expected = run(*leaves)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    with torch.autocast('cuda', dtype=dtype):
        out = run(*leaves)
    for grad, expected_grad in zip(torch.autograd.grad(out.sum(), leaves), expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize('shift', [-100, -20, 100])
@pytest.mark.parametrize('A', [-1e-6, -1e4])
def test_extremes_stay_finite_and_nan_in_its_channel(shift, A):
    inputs = make_inputs(1, 16, 12, 20)
    inputs[0][0, 3, 2, 2] = torch.nan
    inputs[1] = (inputs[1] + shift).clamp(-100, 100)
    inputs[2] = torch.full_like(inputs[2], A)
    leaves = [t.requires_grad_() for t in inputs]
    out = run(*leaves)
    grad_u, grad_delta, grad_A = torch.autograd.grad(out.sum(), leaves[:3])
    others = [i for i in range(16) if i != 3]
    assert out[:, 3].isnan().any()
    for values in (out, grad_u, grad_delta):
        assert values[:, others].isfinite().all()
    assert grad_A[others].isfinite().all()


@pytest.mark.parametrize('height, width', [(1, 1), (17, 23), (30, 304)], ids=str)
@MEMORY_FORMATS
@DTYPES
def test_state_fusion(height, width, memory_format, dtype):
    u, *_, k1, k3, k5, alpha, _ = make_inputs(2, 11, height, width, dtype, memory_format)
    out = check(
        lambda h, k1, k3, k5, alpha: state_fusion(h, (k1, k3, k5), alpha),
        lambda h, k1, k3, k5, alpha: dilated_convolutions(h, (k1, k3, k5), alpha),
        [u, k1, k3, k5, alpha],
        ('h', *NAMES[6:10]),
    )
    assert out.dtype == torch.float32


@pytest.mark.parametrize('length', [1, 300, 20000])
@pytest.mark.parametrize('state', [1, 3, 16])
@DTYPES
def test_selective_scan(length, state, dtype):
    generator = torch.Generator('cuda').manual_seed(length)
    shapes = [(2, 5, length), (2, 5, length), (5, state), (2, state, length), (5,)]
    u, delta, A, B, bias = (torch.randn(s, generator=generator, device='cuda') for s in shapes)
    inputs = [u.to(dtype), delta.to(dtype), -A.exp(), B.to(dtype), bias]
    check(lambda *args: selective_scan(*args, True), true_states, inputs, ('u', 'delta', 'A', 'B', 'delta_bias'))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs a second CUDA GPU')
def test_device_guard():
    inputs = make_inputs(1, 16, 12, 20)
    expected = run(*inputs)
    out = run(*(t.to('cuda:1') for t in inputs))
    assert out.device == torch.device('cuda:1')
    torch.testing.assert_close(out.to(expected.device), expected)


def test_input_on_another_device_is_named():
    inputs = make_inputs(1, 3, 4, 5)
    inputs[3] = inputs[3].cpu()
    with pytest.raises(RuntimeError, match='structure_aware_scan: B must be on cuda:0 .* but is on cpu'):
        run(*inputs)
