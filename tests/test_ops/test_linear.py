from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_ops.truth import relative_error
from torch.utils.flop_counter import FlopCounterMode

from mmspatialmamba import ops
from mmspatialmamba.ops.linear import gelu_linear, linear_weight_gradient

pytestmark = pytest.mark.usefixtures('poisoned_memory')
NATIVE = torch.ops.mmspatialmamba_native if 'native' in ops.available_backends() else None
needs_native = pytest.mark.skipif(NATIVE is None, reason='needs the compiled ops')
# Rows, channels in, channels out: whole tiles, panels, blocks and parts of each instruction set, and what is left over.
SIZES = [
    *[(1, 1, 1), (7, 5, 3), (48, 64, 64), (50, 130, 33), (300, 33, 130), (5, 300, 16), (289, 16, 48)],
    *[(129, 3, 2000), (130, 2000, 3), (9000, 4, 20), (4100, 260, 200)],
]


def linear(x, weight, bias=None):
    """The compiled product, also on processors without AVX2, where the package prefers PyTorch's."""
    return NATIVE.linear(x, weight, bias) if NATIVE else ops.linear(x, weight, bias)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(rows, channels, out):
    x, weight, bias = torch.randn(rows, channels), torch.randn(out, channels) / channels**0.5, torch.randn(out)
    return [t.requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize('with_bias', [True, False], ids=['bias', ''])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_output_and_gradients(sizes, with_bias):
    inputs = make(*sizes)[: 2 + with_bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = linear(*inputs), F.linear(*exact)
    assert relative_error(out, expected) < 2e-6
    grad = torch.randn_like(out)
    for mine, true in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())):
        assert mine.shape == true.shape
        assert relative_error(mine, true) < 5e-6


def test_second_derivatives():
    inputs = make(6, 5, 4)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    seconds = []
    for product, tensors in ((linear, inputs), (F.linear, exact)):
        first = torch.autograd.grad(product(*tensors).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), tensors))
    for mine, true in zip(*seconds):
        assert relative_error(mine, true) < 1e-5


def test_strides_leading_dimensions_and_no_rows():
    weight, wide = torch.randn(20, 17), torch.randn(3, 4, 50)
    for x in (wide[..., 5:22], wide.permute(2, 0, 1)[:17].permute(1, 2, 0), wide[:, ::2, 1:18]):
        for w in (weight, torch.randn(17, 20).t(), torch.randn(40, 34)[::2, ::2]):
            assert relative_error(linear(x, w), F.linear(x.double(), w.double())) < 2e-6
    leaves = [torch.randn(0, 4, 17, requires_grad=True), weight.requires_grad_()]
    out = linear(*leaves)
    assert out.shape == (0, 4, 20)
    grads = torch.autograd.grad(out, leaves, torch.randn(0, 4, 20))
    assert grads[0].shape == (0, 4, 17) and torch.equal(grads[1], torch.zeros(20, 17))


def test_gradients_of_parts_of_a_gradient():
    x, weight, _ = make(40, 6, 10)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    results = []
    for product, tensors in ((linear, (x, weight)), (F.linear, exact)):
        first, second = product(*tensors).chunk(2, dim=-1)
        results.append(torch.autograd.grad(first.sum() + second.t().square().sum(), tensors))
    assert all(relative_error(mine, true) < 2e-6 for mine, true in zip(*results))


def test_one_pixel_without_dimensions_and_no_channels():
    x, weight, bias = make(1, 6, 10)
    leaves = [x.detach()[0].requires_grad_(), weight, bias]
    expected = torch.autograd.grad(F.linear(*leaves).sum(), leaves)
    for mine, true in zip(torch.autograd.grad(linear(*leaves).sum(), leaves), expected):
        torch.testing.assert_close(mine, true)
    assert torch.equal(ops.linear(torch.randn(3, 0), torch.randn(4, 0)), torch.zeros(3, 4))
    assert ops.linear(torch.randn(3, 4), torch.randn(0, 4)).shape == (3, 0)


def true_gelu_linear(x, gelu_bias, weight, bias):
    return F.linear(F.gelu(x + gelu_bias), weight, bias)


@needs_native
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_gelu_and_product(sizes):
    x, weight, bias = make(*sizes)
    inputs = [x, torch.randn(sizes[1], requires_grad=True), weight, bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = gelu_linear(*inputs), true_gelu_linear(*exact)
    assert relative_error(out, expected) < 2e-6
    grad = torch.randn_like(out)
    for mine, true in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, exact, grad.double())):
        assert mine.shape == true.shape
        assert relative_error(mine, true) < 5e-6


@needs_native
def test_gelu_and_product_of_strided_and_of_no_rows():
    x, weight, bias = make(6, 17, 20)
    wide = torch.randn(3, 4, 50)
    for x in (wide[..., 5:22], wide.permute(2, 0, 1)[:17].permute(1, 2, 0), torch.randn(0, 3, 17)):
        inputs = [t.detach().requires_grad_() for t in (x, torch.randn(17), weight, bias)]
        out, expected = gelu_linear(*inputs), true_gelu_linear(*inputs)
        torch.testing.assert_close(out, expected)
        grad = torch.randn(20, *out.shape[:-1]).permute(1, 2, 0)
        mine, true = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
        torch.testing.assert_close(mine, true)


@needs_native
def test_second_derivatives_of_gelu_and_product():
    x, weight, bias = make(6, 5, 4)
    inputs = [x, torch.randn(5, requires_grad=True), weight, bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    seconds = []
    for function, tensors in ((gelu_linear, inputs), (true_gelu_linear, exact)):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), tensors))
    for mine, true in zip(*seconds):
        assert relative_error(mine, true) < 1e-5


@needs_native
def test_only_the_factors_of_gradients_that_are_needed_are_kept():
    for frozen in range(2):
        inputs, kept = make(40, 6, 10), []
        inputs[frozen].requires_grad_(False)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            linear(*inputs)
        assert [t.shape for t in kept] == [inputs[frozen].shape]


@needs_native
def test_only_the_gradients_that_are_needed_are_computed():
    x, weight, bias = make(40, 6, 10)
    for frozen, products in ((x, 1), (weight, 1), (bias, 2)):
        frozen.requires_grad_(False)
        out = linear(x, weight, bias)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == products * 2 * 40 * 6 * 10
        assert frozen.grad is None
        frozen.requires_grad_()
        for tensor in (x, weight, bias):
            tensor.grad = None


def test_special_values_stay_in_their_row():
    x = torch.randn(60, 40)
    x[7, 3], x[20, 5] = torch.nan, torch.inf
    rows = ~linear(x, torch.randn(50, 40)).isfinite().all(1)
    assert rows.nonzero().flatten().tolist() == [7, 20]
    columns = ~linear_weight_gradient(torch.randn(60, 50), x).isfinite().all(0)
    assert columns.nonzero().flatten().tolist() == [3, 5]


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    x, weight, bias = make(5000, 48, 70)
    gelu_bias = torch.randn(48, requires_grad=True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, activated = linear(x, weight), gelu_linear(x, gelu_bias, weight, bias)
        results.append([out, *torch.autograd.grad(out, [x, weight], torch.ones_like(out))])
        leaves = [x, gelu_bias, weight, bias]
        results[-1] += [activated, *torch.autograd.grad(activated, leaves, torch.ones_like(activated))]
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_native
@pytest.mark.parametrize('with_bias', [True, False], ids=['bias', ''])
def test_opcheck(with_bias):
    x, weight, bias = make(5, 4, 3)
    torch.library.opcheck(NATIVE.linear.default, (x, weight, bias if with_bias else None))
    torch.library.opcheck(NATIVE.linear_weight_gradient.default, (torch.randn(5, 3).requires_grad_(), x))


@needs_native
def test_opcheck_of_gelu_and_product():
    x, weight, bias = make(5, 4, 3)
    inputs = [x, torch.randn(4, requires_grad=True), weight, bias]
    torch.library.opcheck(NATIVE.gelu_linear.default, inputs)
    torch.library.opcheck(NATIVE.gelu_linear_backward.default, [torch.randn(5, 3), *(t.detach() for t in inputs)])


@needs_native
def test_gelu_and_product_are_counted_as_their_products():
    x, weight, bias = make(40, 6, 10)
    inputs = [x, torch.randn(6, requires_grad=True), weight, bias]
    with FlopCounterMode(display=False) as forward:
        out = gelu_linear(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 40 * 6 * 10
    assert backward.get_total_flops() == 2 * 2 * 40 * 6 * 10


@needs_native
def test_shapes_that_gelu_and_product_refuse():
    x, weight, bias = make(40, 6, 10)
    with pytest.raises(RuntimeError, match=r'gelu_linear: gelu_bias must have shape \(6\), but has \[5\]'):
        gelu_linear(x, torch.randn(5), weight, bias)
    with pytest.raises(RuntimeError, match=r'gelu_linear: weight must have shape \(out, 6\), but has \[10, 5\]'):
        gelu_linear(x, torch.randn(6), weight[:, :5], bias)


def test_which_products_are_native():
    x, weight, _ = make(4, 3, 2)

    def is_native(x, weight, bias=None):
        return 'mmspatialmamba' in type(ops.linear(x, weight, bias).grad_fn).__name__

    assert is_native(x, weight) == (NATIVE is not None and NATIVE.instruction_set() != 'baseline')
    assert not is_native(x.double(), weight.double())
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_native(x, weight)
        assert ops.linear(x, weight).dtype == torch.bfloat16
    with ops.use_backend('torch'):
        assert not is_native(x, weight)
    compiled = torch.compile(ops.linear, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


@needs_native
def test_bad_input_is_refused():
    with pytest.raises(RuntimeError, match=r'linear: weight must have shape \(out, 3\), but has \[2, 5\]'):
        linear(torch.randn(4, 3), torch.randn(2, 5))
    for bias in (torch.randn(3), torch.randn(2, 1)):
        with pytest.raises(RuntimeError, match=r'linear: bias must have shape \(2\), but has'):
            linear(torch.randn(4, 3), torch.randn(2, 3), bias)
    with pytest.raises(RuntimeError, match='linear: the gradient has 4 rows, but x has 5'):
        NATIVE.linear_weight_gradient(torch.randn(4, 3), torch.randn(5, 3))
