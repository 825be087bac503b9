"""What autograd does not store gives the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmspatialmamba import ops
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import SpatialMambaBlock, recompute
from mmspatialmamba.models.layers.recompute import Recomputed, feed

# A model on Triton's interpreter would take hours.
CPU_BACKENDS = [name for name in ops.available_backends() if name != 'triton']
SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1))


def gradients(dtype=None, drop=True):
    """Outputs and gradients of a small backbone with drop path, under autocast to ``dtype``."""
    with pytest.MonkeyPatch.context() as patch:
        if not drop:
            patch.setattr(recompute, '_may_drop', lambda: False)
        torch.manual_seed(0)
        model = SpatialMamba(SMALL, drop_path_rate=0.5).train()
        image = torch.randn(2, 3, 40, 56, requires_grad=True)
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model(image)
        sum(output.float().square().mean() for output in outputs).backward()
    return [*outputs, image.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_stored_tensors(backend, dtype):
    with ops.use_backend(backend):
        for dropped, stored in zip(gradients(dtype), gradients(dtype, drop=False)):
            assert torch.equal(dropped, stored)


@pytest.mark.parametrize('forward', [True, False], ids=['forward', ''])
@pytest.mark.parametrize('backward', [True, False], ids=['backward', ''])
def test_gradients_under_autocast_of_either_pass(forward, backward):
    norm, linear, x = nn.LayerNorm(4), nn.Linear(4, 4), torch.randn(3, 4)
    grads = []
    for function in (lambda x: linear(norm(x)), lambda x: feed(linear, Recomputed(norm, x))):
        with torch.autocast('cpu', torch.bfloat16, enabled=forward):
            out = function(x).float().square().sum()
        with torch.autocast('cpu', torch.bfloat16, enabled=backward):
            grads.append(torch.autograd.grad(out, [linear.weight, norm.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.slow
def test_second_derivatives():
    torch.manual_seed(0)
    block = SpatialMambaBlock(4).double()
    image = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    with ops.use_backend('torch'):
        torch.autograd.gradcheck(block, image)
        torch.autograd.gradgradcheck(block, image)


def test_a_tensor_lives_as_long_as_its_consumer_runs():
    stored = []
    x = torch.randn(5, 4, requires_grad=True)

    def consumer(h):
        stored.append(h.untyped_storage()._weak_ref())
        return h * h.view(4, 5).t() * x

    out = feed(consumer, Recomputed(torch.sin, x))
    assert torch.UntypedStorage._expired(stored[0])
    torch.UntypedStorage._free_weak_ref(stored[0])
    (grad,) = torch.autograd.grad(out.sum(), x)
    leaf = x.detach().requires_grad_()
    h = leaf.sin()
    (expected,) = torch.autograd.grad((h * h.view(4, 5).t() * leaf).sum(), leaf)
    assert torch.equal(grad, expected)


def test_within_a_checkpoint_nothing_more_is_kept():
    x, calls = torch.randn(4, requires_grad=True), []

    def function(x):
        calls.append(Recomputed(torch.sin, x))
        return feed(torch.square, calls[-1])

    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert [source.again for source in calls] == [None, None]
    torch.testing.assert_close(x.grad, torch.sin(2 * x).detach())


def test_runs_on_tensors_without_data():
    with torch.device('meta'):
        model, image = SpatialMamba(SMALL).train(), torch.rand(1, 3, 64, 64)
    assert [output.shape[1] for output in model(image)] == [8, 16, 32, 64]


def test_computed_again_once_for_all_consumers():
    calls = []

    def function(x):
        calls.append(len(calls))
        return x.sin()

    x = torch.randn(5, requires_grad=True)
    source = Recomputed(function, x)
    out = feed(torch.square, source) + feed(lambda h: h * h * x, source)
    for backward_pass in (1, 2):
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert len(calls) == 1 + backward_pass
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad((leaf.sin().square() * (1 + leaf)).sum(), leaf)
    torch.testing.assert_close(grad, expected)
