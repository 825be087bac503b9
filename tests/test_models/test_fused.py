"""What fused layers do not keep for backward gives the same gradients."""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import mmspatialmamba
from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import MLP, SpatialMambaBlock, fused
from mmspatialmamba.ops import dispatch

# A model on Triton's interpreter would take hours.
CPU_BACKENDS = [name for name in ops.available_backends() if name != 'triton']
# PyTorch has float16 autocast on a CPU since 2.3.
AUTOCAST_DTYPES = [None, torch.bfloat16, torch.float16] if TORCH >= (2, 3) else [None, torch.bfloat16]
SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1))


def plain_linear(function, weight, bias, *inputs):
    return nn.functional.linear(function(*inputs), weight, bias)


def plain_scan(weight, dt, u, A, B, C, D, k1, k3, k5, alpha, dt_bias):
    delta = nn.functional.linear(dt, weight).permute(0, 3, 1, 2)
    return ops.structure_aware_scan(u, delta, A, B, C, D, (k1, k3, k5), alpha, dt_bias)


def gradients(dtype=None, stored=False):
    """Outputs and gradients of a small backbone with drop path, under autocast to ``dtype``."""
    with pytest.MonkeyPatch.context() as patch:
        if stored:
            patch.setattr(fused._RecomputedLinear, 'apply', plain_linear)
            patch.setattr(fused._RecomputedScan, 'apply', plain_scan)
        torch.manual_seed(0)
        model = SpatialMamba(SMALL, drop_path_rate=0.5).train()
        image = torch.randn(2, 3, 40, 56, requires_grad=True)
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model(image)
        sum(output.float().square().mean() for output in outputs).backward()
    return [*outputs, image.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize('backend', CPU_BACKENDS)
@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES, ids=str)
def test_gradients_are_those_of_stored_tensors(backend, dtype):
    with ops.use_backend(backend):
        for recomputed, stored in zip(gradients(dtype), gradients(dtype, stored=True)):
            rtol = 1e-5 if dtype is None else 2e-2
            assert (recomputed - stored).norm() <= rtol * stored.norm() + 1e-6


@pytest.mark.parametrize('forward', [True, False], ids=['forward', ''])
@pytest.mark.parametrize('backward', [True, False], ids=['backward', ''])
def test_gradients_under_autocast_of_either_pass(forward, backward):
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(4), nn.Linear(4, 4), torch.randn(3, 4)
    grads = []
    for function in (lambda x: linear(norm(x)), lambda x: fused.layer_norm_linear(norm, linear, x)):
        with torch.autocast('cpu', torch.bfloat16, enabled=forward):
            out = function(x).float().square().sum()
        with torch.autocast('cpu', torch.bfloat16, enabled=backward and forward):
            grads.append(torch.autograd.grad(out, [linear.weight, linear.bias, norm.weight]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=2e-2 if forward else 1e-6, atol=1e-2 if forward else 1e-6)


@pytest.mark.slow
def test_second_derivatives():
    torch.manual_seed(0)
    block = SpatialMambaBlock(4).double()
    image = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(block, image)
    torch.autograd.gradgradcheck(block, image)


def test_products_with_the_hessian():
    torch.manual_seed(0)
    block = SpatialMambaBlock(4).double()
    image, v = torch.randn(2, 1, 4, 3, 2, dtype=torch.float64)

    def loss(x):
        return block(x).sin().sum()

    hvp, vhp = (
        function(loss, image, v)[1] for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp)
    )
    step = 1e-5
    ahead, behind = (torch.autograd.functional.vjp(loss, image + sign * step * v)[1] for sign in (1, -1))
    assert hvp.abs().max() > 1e-2
    torch.testing.assert_close(hvp, vhp)
    torch.testing.assert_close(hvp, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('with_cp', [False, True], ids=['', 'with_cp'])
def test_a_graph_is_differentiated_twice(with_cp):
    torch.manual_seed(0)
    block, image = SpatialMambaBlock(4, with_cp=with_cp), torch.randn(2, 4, 5, 3, requires_grad=True)
    loss = block(image).square().sum()
    first, second = (torch.autograd.grad(loss, image, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_batched_gradients():
    torch.manual_seed(0)
    mlp, x = MLP(4), torch.randn(3, 4, requires_grad=True)
    y, directions = mlp(x), torch.randn(5, 3, 4)
    (batched,) = torch.autograd.grad(y, x, directions, retain_graph=True, is_grads_batched=True)
    for grad, direction in zip(batched, directions):
        torch.testing.assert_close(grad, torch.autograd.grad(y, x, direction, retain_graph=True)[0])


@pytest.mark.parametrize('shape', [(4,), (0, 4), (2, 3, 5, 4)], ids=str)
def test_outputs_may_be_changed_in_place(shape):
    torch.manual_seed(0)
    mlp, grads = MLP(4), []
    for change in (lambda y: y.mul_(2), lambda y: y * 2):
        x = torch.ones(shape, requires_grad=True)
        change(mlp(x)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize('hooked', [False, True], ids=['', 'hooked'])
@pytest.mark.parametrize('with_cp', [False, True], ids=['', 'with_cp'])
@pytest.mark.parametrize('name', CPU_BACKENDS)
def test_backward_runs_on_the_backend_of_forward(name, with_cp, hooked, monkeypatch):
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    torch.manual_seed(0)
    block, chosen = SpatialMambaBlock(4, with_cp=with_cp), []
    if hooked:
        block.mlp.fc2.register_forward_hook(lambda *args: None)
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, 'choose', lambda *tensors: chosen.append(choose(*tensors)) or chosen[-1])
    with ops.use_backend(name):
        y = block(torch.randn(1, 4, 5, 3, requires_grad=True))
    y.sum().backward()
    assert set(chosen) == {name}


def test_models_in_threads_have_a_backend_each(monkeypatch):
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    torch.manual_seed(0)
    model, image = SpatialMamba(SMALL, drop_path_rate=0.0).train(), torch.randn(2, 3, 40, 24)
    choose, chosen = dispatch.choose, defaultdict(set)

    def record(*tensors):
        name = choose(*tensors)
        chosen[threading.get_ident()].add(name)
        return name

    def train(model, name, meet):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            with ops.use_backend(name):
                meet()
                outputs = model(image)
                meet()
            sum(output.square().mean() for output in outputs).backward()
            meet()
            optimizer.step()
            optimizer.zero_grad()
        return *outputs, *model.parameters()

    models = [copy.deepcopy(model) for _ in CPU_BACKENDS]
    alone = [train(copy.deepcopy(model), name, lambda: None) for name in CPU_BACKENDS]
    monkeypatch.setattr(dispatch, 'choose', record)
    meet = threading.Barrier(len(models), timeout=60).wait
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(train, models, CPU_BACKENDS, [meet] * len(models)))
    assert sorted(chosen.values(), key=min) == [{name} for name in sorted(CPU_BACKENDS)]
    for tensors, expected in zip(together, alone):
        assert all(map(torch.equal, tensors, expected))


def test_functional_calls_use_the_parameters_given():
    torch.manual_seed(0)
    block = SpatialMambaBlock(4)
    image = torch.randn(2, 4, 5, 3)
    parameters = dict(block.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(block, parameters, (image,)).square().sum()

    doubled = {name: (2 * parameter).detach().requires_grad_() for name, parameter in parameters.items()}
    grads = torch.autograd.grad(loss(doubled), list(doubled.values()))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter *= 2
    loss(parameters).backward()
    for parameter, grad in zip(parameters.values(), grads):
        torch.testing.assert_close(grad, parameter.grad)


def test_vmap_over_models():
    torch.manual_seed(0)
    models = [SpatialMamba(SMALL, out_indices=3).eval() for _ in range(2)]
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        run = torch.vmap(lambda *state: torch.func.functional_call(models[0], state, (image,)))
        (outputs,) = run(*torch.func.stack_module_state(models))
        for output, model in zip(outputs, models):
            torch.testing.assert_close(output, model(image)[0], rtol=1e-5, atol=1e-5)


def test_function_transforms():
    torch.manual_seed(0)
    model = SpatialMamba(SMALL, out_indices=3).eval()
    parameters, images = dict(model.named_parameters()), torch.randn(2, 3, 16, 16)
    direction = torch.randn_like(images)

    def features(images):
        return model(images)[0].flatten()

    def loss(parameters, images):
        return torch.func.functional_call(model, parameters, (images,))[0].square().sum()

    truth = torch.autograd.grad(loss(parameters, images), list(parameters.values()))
    each = torch.vmap(torch.func.grad(lambda p, image: loss(p, image[None])), (None, 0))(parameters, images)
    for grads in (torch.func.grad(loss)(parameters, images), {name: grad.sum(0) for name, grad in each.items()}):
        torch.testing.assert_close(list(grads.values()), list(truth), rtol=1e-4, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(features, images)
    torch.testing.assert_close(torch.func.jacrev(features)(images), jacobian, rtol=1e-4, atol=1e-5)
    _, vjp = torch.func.vjp(features, images)
    cotangent = torch.randn(len(jacobian))
    torch.testing.assert_close(vjp(cotangent)[0], torch.tensordot(cotangent, jacobian, 1), rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(features, (images,), (direction,))
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, direction, 4), rtol=1e-4, atol=1e-5)
    outputs = torch.vmap(lambda image: features(image[None]))(images)
    torch.testing.assert_close(outputs.flatten(), features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'options, transform, message',
    [
        ({}, torch.func.grad, 'in-place operation .* that would mutate a captured Tensor'),
        ({}, torch.vmap, 'Batch norm got a batched tensor as input while the running_mean or running_var'),
        (dict(norm_eval=True), torch.vmap, 'called random operation while in randomness error mode'),
        (dict(norm_eval=True, with_cp=True), torch.func.grad, "don't yet support saved tensor hooks"),
    ],
    ids=['grad of BatchNorm', 'vmap of BatchNorm', 'vmap of drop path', 'with_cp'],
)
def test_what_torch_does_not_transform(options, transform, message):
    """PyTorch's limits in training, which docs/numerics.md names."""
    model, images = SpatialMamba(SMALL, out_indices=1, **options).train(), torch.randn(2, 1, 3, 16, 16)
    with pytest.raises(RuntimeError, match=message):
        transform(lambda image: model(image)[0].sum())(images[0] if transform is torch.func.grad else images)


def test_runs_on_tensors_without_data():
    with torch.device('meta'):
        model, image = SpatialMamba(SMALL).train(), torch.rand(1, 3, 64, 64)
    assert [output.shape[1] for output in model(image)] == [8, 16, 32, 64]


def test_forward_pass_is_short():
    """At most 12 files of this package and 1,000 Python calls in them for a training forward pass of ``tiny``."""
    model, image, calls = SpatialMamba('tiny').train(), torch.rand(1, 3, 64, 64), Counter()
    package = str(Path(mmspatialmamba.__file__).parent)

    def profile(frame, event, argument):
        if event == 'call' and frame.f_code.co_filename.startswith(package):
            calls[frame.f_code.co_filename] += 1

    model(image)
    sys.setprofile(profile)
    try:
        model(image)
    finally:
        sys.setprofile(None)
    # In earlier versions functions of compat.py stand in for PyTorch's.
    files, number = (12, 1000) if hasattr(nn.modules.module, '_has_any_global_hook') else (13, 2000)
    assert len(calls) <= files and sum(calls.values()) <= number, calls
