import math

import pytest
import torch
from test_ops.truth import relative_error, sequential_scan

from mmspatialmamba import ops
from mmspatialmamba.ops import selective_scan

pytestmark = pytest.mark.usefixtures('poisoned_memory')


def make_inputs(batch, dim, state, length, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        'u': normal(batch, dim, length),
        'delta': normal(batch, dim, length),
        'A': -torch.exp(normal(dim, state)),
        'B': normal(batch, state, length),
        'delta_bias': normal(dim),
    }


def gradients(function, inputs, grad_out, **kwargs):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    function(**leaves, **kwargs).backward(grad_out)
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize('name', ['n1', 'n4', 'long'])
def test_equals_reference(backend, goldens, name):
    prefix = f'scan/{name}/'
    inputs = {key[len(prefix) + 3 :]: value for key, value in goldens.items() if key.startswith(f'{prefix}in/')}
    out = selective_scan(**inputs, delta_softplus=True)
    assert relative_error(out, goldens[f'{prefix}out']) < 1e-6
    grads = gradients(selective_scan, inputs, goldens[f'{prefix}grad_out'], delta_softplus=True)
    for key, grad in grads.items():
        assert relative_error(grad, goldens[f'{prefix}grad/{key}']) < 2e-6, key


@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 31, 37, 256, 257, 1000])
@pytest.mark.parametrize('state', [1, 3])
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_forward_and_gradients_equal_sequential(backend, length, state, softplus):
    inputs = make_inputs(2, 3, state, length)
    if not softplus:
        inputs['delta'] = inputs['delta'].abs()
        inputs['delta_bias'] = inputs['delta_bias'].abs()
    out = selective_scan(**inputs, delta_softplus=softplus)
    assert out.dtype == torch.float32
    assert relative_error(out, sequential_scan(**inputs, delta_softplus=softplus)) < 2e-6
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = gradients(selective_scan, inputs, grad_out, delta_softplus=softplus)
    truth = gradients(sequential_scan, inputs, grad_out.double(), delta_softplus=softplus)
    for key in inputs:
        assert relative_error(grads[key], truth[key]) < 5e-6, key


@pytest.mark.parametrize('decay', [0.01, 0.5, 0.99, 0.9999])
def test_long_sequences_of_one_decay(backend, decay):
    length = 100_000
    u = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(2))
    one = torch.ones(1, 1, length)
    A = torch.tensor([[math.log(decay)]])
    truth, h = [], 0.0
    for x in u.flatten().tolist():
        h = math.exp(A.item()) * h + x
        truth.append(h)
    truth = torch.tensor(truth, dtype=torch.float64).view(1, 1, 1, length)
    if backend == 'torch':
        out = selective_scan(u.double(), one.double(), A.double(), one.double())
        assert relative_error(out, truth) < 1e-11
    # float32 rounds the decay, and 1 / (1 - decay) steps add that up.
    bound = 1e-6 + 2**-24 / (1 - decay)
    assert relative_error(selective_scan(u, one, A, one), truth) < bound


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 1e-6), (torch.float16, 1e-6)], ids=['bfloat16', 'float16'])
def test_half_precision_inputs_have_a_float32_state(backend, dtype, bound):
    inputs = make_inputs(2, 3, 2, 300, dtype)
    out = selective_scan(**inputs, delta_softplus=True)
    assert out.dtype == torch.float32
    # The inputs are rounded before, not the state: the truth has the same rounded inputs.
    assert relative_error(out, sequential_scan(**inputs, delta_softplus=True)) < bound


def test_float64_gradients():
    inputs = make_inputs(1, 2, 2, 19, torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan(*x, delta_softplus=True), leaves, fast_mode=True)


def test_extreme_steps_stay_finite(backend):
    inputs = make_inputs(1, 4, 1, 200)
    inputs['delta'] = torch.linspace(-100, 100, 200).expand(1, 4, 200).contiguous()
    inputs['A'] = -torch.tensor([[0.0], [1e-6], [1.0], [1e6]])
    out = selective_scan(**inputs, delta_softplus=True)
    assert out.isfinite().all()
    grads = gradients(selective_scan, inputs, torch.ones_like(out), delta_softplus=True)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_nan_stays_in_its_channel(backend):
    inputs = make_inputs(2, 3, 1, 50)
    inputs['u'][1, 2, 10] = float('nan')
    out = selective_scan(**inputs, delta_softplus=True)
    assert out[1, 2, 0, 10:].isnan().all()
    out[1, 2, 0, 10:] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize(
    'change, error, message',
    [
        ({'delta': torch.zeros(1, 2, 4)}, ValueError, r'delta must have the shape \(1, 2, 5\)'),
        ({'B': torch.zeros(1, 2, 5)}, ValueError, r'B must have the shape \(1, 3, 5\)'),
        ({'A': torch.zeros(3)}, ValueError, r'A must have the shape \(2, \*\), but has \(3,\)'),
        ({'delta_bias': torch.zeros(3)}, ValueError, r'delta_bias must have the shape \(2\)'),
        ({'u': torch.zeros(1, 2, 5, dtype=torch.long)}, TypeError, 'u must be a floating point'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_input_is_named(change, error, message):
    inputs = {**make_inputs(1, 2, 3, 5), **change}
    with pytest.raises(error, match=f'selective_scan: {message}'):
        selective_scan(**inputs)


@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
@pytest.mark.parametrize('name', ['delta', 'A', 'B', 'delta_bias'])
def test_the_compiled_op_refuses_what_does_not_fit(name):
    inputs = make_inputs(2, 3, 2, 4)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(RuntimeError, match='selective_scan: .* must have'):
        torch.ops.mmspatialmamba_native.selective_scan(*inputs.values(), True)
