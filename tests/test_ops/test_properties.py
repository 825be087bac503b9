"""Numbers stay numbers, and right ones, on inputs that no network should have."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops.bounds import (
    BOUNDS,
    DTYPES,
    INPUTS,
    MAPS,
    bound,
    measure,
    ordinary_inputs,
    output_and_gradients,
    run,
    run_truth,
)
from test_ops.truth import positive_decay

pytestmark = pytest.mark.usefixtures('poisoned_memory')

DOCS = Path(__file__).parents[2] / 'docs' / 'numerics.md'
SIZES = [(1, 1), (1, 12), (12, 1), (2, 3), (5, 5), (11, 4), (13, 3), (3, 17), (8, 8)]
OPS = list(INPUTS)
# A step or a decay below the smallest normal float32 may count as 0: results as small are not compared.
FLOOR = 1e-24


def deterministic(max_examples):
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@st.composite
def cases(draw, op):
    """Inputs of an op by name, a gradient of its output, and its other arguments."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch, dim = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 7, 16, 33, 40]))
    height, width = draw(st.sampled_from(SIZES))
    state = draw(st.sampled_from([1, 3])) if op == 'selective_scan' else 1
    dtype, parameter_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(['float32', 'like the maps']))
    parameter_dtype = torch.float32 if parameter_dtype == 'float32' else dtype
    softplus = op != 'state_fusion' and draw(st.booleans())

    def normal(*shape):
        return draw(st.sampled_from([1.0, 1.0, 1.0, 30.0, 0.0])) * torch.randn(*shape, generator=generator)

    def lay_out(channels_first):
        kind = draw(st.sampled_from(['contiguous', 'channels last', 'slice of channels last']))
        if kind == 'contiguous':
            return channels_first.contiguous()
        last = channels_first.movedim(1, -1)
        if kind == 'slice of channels last':
            return torch.cat([last, last], dim=-1).movedim(-1, 1)[:, :dim]
        return last.contiguous().movedim(-1, 1)

    pixels = (height * width,) if op == 'selective_scan' else (height, width)
    low, high = draw(st.sampled_from([(-100, 100), (-100, -90), (90, 100), (-5, 0), (0, 0)]))
    delta = low + (high - low) * torch.rand(batch, dim, *pixels, generator=generator)
    rates = draw(st.lists(st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e4]), min_size=1, max_size=3))
    A = -torch.tensor([rates[i % len(rates)] for i in range(dim * state)]).view(dim, state)
    maps = {
        'u': lay_out(normal(batch, dim, *pixels).to(dtype)),
        'h': lay_out(normal(batch, dim, *pixels).to(dtype)),
        'delta': lay_out((delta if softplus else delta.abs()).to(dtype)),
        'B': normal(batch, state, *pixels).to(dtype),
        'C': normal(batch, 1, *pixels).to(dtype),
    }
    parameters = {f'kernel{k}': normal(dim, 1, 3, 3) for k in (1, 3, 5)}
    parameters |= {'A': A, 'D': normal(dim), 'alpha': normal(3)}
    bias = torch.randn(dim, generator=generator)
    parameters['delta_bias'] = bias if softplus else bias.abs()
    values = {**maps, **{name: value.to(parameter_dtype) for name, value in parameters.items()}}
    inputs = {name: values[name] for name in INPUTS[op]}
    if op != 'state_fusion' and draw(st.booleans()):
        inputs['delta_bias'] = None
    grad = normal(batch, dim, state, *pixels) if op == 'selective_scan' else normal(batch, dim, *pixels)
    if op == 'structure_aware_scan':
        grad = grad.to(dtype)
    return inputs, grad, {} if op == 'state_fusion' else {'delta_softplus': softplus}


def check_against_truth(op, inputs, grad, arguments):
    values = output_and_gradients(run, op, inputs, grad, **arguments)
    doubles = {name: None if t is None else t.double() for name, t in inputs.items()}
    truths = output_and_gradients(run_truth, op, doubles, grad.double(), **arguments)
    # Where terms cancel no sum is accurate relative to its value, but relative to its terms.
    positive = {n: t if t is None or n in ('A', 'delta', 'delta_bias') else t.abs() for n, t in doubles.items()}
    decay = {} if op == 'state_fusion' else {'decay': positive_decay}
    scales = output_and_gradients(run_truth, op, positive, grad.double().abs(), **arguments, **decay)
    for name, truth in truths.items():
        value, dtype = values[name], values[name].dtype
        if name != 'output':
            assert (value.shape, dtype) == (inputs[name].shape, inputs[name].dtype), name
        representable = truth.abs() < 0.99 * torch.finfo(dtype).max
        assert value[representable].isfinite().all(), name
        assert not value.isnan().any(), name
        scale = scales[name][representable].abs().max() if representable.any() else torch.ones(())
        allowed = bound(dtype, name != 'output') * scale.clamp(min=max(torch.finfo(dtype).tiny, FLOOR))
        error = (value.double() - truth)[representable].abs()
        assert (error <= allowed).all(), f'{name}: {(error.max() / scale).item():.3g}'


@given(cases('selective_scan'))
@deterministic(12)
def test_selective_scan_is_right_on_any_input(backend, case):
    check_against_truth('selective_scan', *case)


@given(cases('state_fusion'))
@deterministic(12)
def test_state_fusion_is_right_on_any_input(backend, case):
    check_against_truth('state_fusion', *case)


@given(cases('structure_aware_scan'))
@deterministic(25)
def test_structure_aware_scan_is_right_on_any_input(backend, case):
    check_against_truth('structure_aware_scan', *case)


@pytest.mark.slow
@pytest.mark.parametrize('op', OPS)
def test_op_is_right_on_more_inputs(backend, op):
    @given(cases(op))
    @deterministic(150)
    def check(case):
        check_against_truth(op, *case)

    check()


def other_channels(name, tensor, channel):
    """What of a result does not belong to the channel: none of it where channels are summed."""
    if name in ('B', 'C', 'alpha'):
        return tensor[:0]
    axis = 1 if name in (*MAPS, 'output') else 0
    others = [i for i in range(tensor.shape[axis]) if i != channel]
    return tensor.index_select(axis, torch.tensor(others, dtype=torch.long))


@pytest.mark.parametrize('name', ['u', 'delta'])
@pytest.mark.parametrize('op', ['selective_scan', 'structure_aware_scan'])
def test_nan_stays_in_its_channel(backend, op, name):
    @given(cases(op), st.data())
    @deterministic(8)
    def check(case, data):
        inputs, grad, arguments = case
        poisoned = inputs[name].clone()
        clean = output_and_gradients(run, op, {**inputs, name: poisoned}, grad, **arguments)
        poisoned = poisoned.clone()
        image, channel, *pixel = (data.draw(st.integers(0, size - 1)) for size in poisoned.shape)
        poisoned[(image, channel, *pixel)] = float('nan')
        results = output_and_gradients(run, op, {**inputs, name: poisoned}, grad, **arguments)
        assert results['output'][image, channel].isnan().any()
        for key, result in results.items():
            expected, found = (other_channels(key, t, channel) for t in (clean[key], result))
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=key)

    check()


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('op', OPS)
def test_errors_are_within_the_published_bounds(backend, op, dtype):
    errors = measure(op, dtype)
    assert set(errors) == set(BOUNDS[op][dtype])
    assert {name: e for name, e in errors.items() if e > BOUNDS[op][dtype][name]} == {}


def test_published_table_has_these_bounds():
    rows = [line.strip('| \n').split(' | ') for line in DOCS.read_text().splitlines() if line.startswith('| s')]
    published = {}
    for op, result, *cells in rows:
        name = result.removeprefix('gradient of ')
        for dtype, stated, measured in zip(DTYPES, cells[::2], cells[1::2]):
            assert float(measured) <= float(stated), (op, result)
            published.setdefault(op, {}).setdefault(dtype, {})[name] = stated
    assert published == {
        op: {dtype: {name: f'{b:.2e}' for name, b in names.items()} for dtype, names in of_op.items()}
        for op, of_op in BOUNDS.items()
    }


@pytest.mark.parametrize('op', OPS)
def test_results_are_the_same_each_time(backend, op):
    inputs, grad = ordinary_inputs(op, torch.float32)
    first, second = (output_and_gradients(run, op, inputs, grad) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
