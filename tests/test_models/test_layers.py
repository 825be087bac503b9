"""The rule of the layers: every module is called once a pass, and what it does is what trains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from mmspatialmamba.models.layers import Downsample, SpatialMambaBlock, Stem, fused

NETWORKS = {
    'block': (lambda with_cp=False: SpatialMambaBlock(16, lambda: nn.Dropout(0.2), with_cp), (2, 16, 5, 7)),
    'stem': (lambda with_cp=False: Stem(3, 16, with_cp=with_cp), (2, 3, 19, 26)),
    'downsample': (lambda with_cp=False: Downsample(8, with_cp=with_cp), (2, 8, 5, 6)),
}
MODES = ('training', 'with_cp', 'autocast', 'inference')


def leaves(name):
    """Names of a network's leaf modules; a ParameterList is no module to call."""
    modules = NETWORKS[name][0]().named_modules()
    return [path for path, m in modules if not list(m.children()) and not isinstance(m, nn.ParameterList)]


LEAVES = [(name, leaf) for name in NETWORKS for leaf in leaves(name)]
WEIGHTED = [(name, leaf) for name, leaf in LEAVES if list(NETWORKS[name][0]().get_submodule(leaf).parameters())]


def noise_like(tensor):
    return torch.arange(tensor.numel()).sin().view_as(tensor).to(tensor.dtype)


class Counter:
    """Forward hook: counts the calls, and changes the output."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, args, output):
        self.calls += 1
        return output + noise_like(output)


class PreCounter(Counter):
    """Forward pre-hook: counts the calls, and changes the input."""

    def __call__(self, module, args):
        self.calls += 1
        return (args[0] + noise_like(args[0]),)


class Adapter(nn.Module):
    """LoRA-like: a module, and a small copy of it behind dropout."""

    def __init__(self, base):
        super().__init__()
        self.base, self.copy, self.dropout, self.calls = base, copy.deepcopy(base), nn.Dropout(0.4), 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) + 0.3 * self.copy(self.dropout(x))


class Replacement(nn.Module):
    """BatchNorm over the last dimension for a LayerNorm; else the module, between others of the same shape."""

    def __init__(self, base):
        super().__init__()
        self.norm = nn.BatchNorm1d(base.normalized_shape[0]) if isinstance(base, nn.LayerNorm) else None
        self.base, self.calls = base, 0

    def forward(self, x):
        self.calls += 1
        if self.norm is not None:
            return self.norm(x.flatten(0, -2)).view_as(x)
        y = self.base(x * 0.7)
        return y + noise_like(y)


class Shift(nn.Module):
    """Parametrization: counts the calls, and shifts a weight."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight + noise_like(weight)


class Int8Weight(torch.Tensor):
    """Weight-only quantization: int8 values and a scale, dequantized by whatever reads them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors, as torchao's

    @staticmethod
    def __new__(cls, weight):
        result = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        result.scale = weight.abs().max() / 127
        result.values = (weight / result.scale).round().to(torch.int8)
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def dequantize(value):
            return value.values.float() * value.scale if isinstance(value, cls) else value

        if function is torch.ops.aten.detach.default:
            return args[0]
        return function(*torch.utils._pytree.tree_map(dequantize, args), **(kwargs or {}))


def parent_of(network, leaf):
    path, _, name = leaf.rpartition('.')
    return network.get_submodule(path), name


def replace(network, leaf, wrapper):
    parent, name = parent_of(network, leaf)
    module = wrapper(getattr(parent, name))
    setattr(parent, name, module)
    return module


def hook(network, leaf):
    counter = Counter()
    network.get_submodule(leaf).register_forward_hook(counter)
    return counter


def pre_hook(network, leaf):
    counter = PreCounter()
    network.get_submodule(leaf).register_forward_pre_hook(counter)
    return counter


def parametrized(network, leaf):
    counter = Shift()
    parametrize.register_parametrization(network.get_submodule(leaf), 'weight', counter)
    return counter


def counted(network, leaf):
    """A counter for a change that has none of its own; it changes nothing."""
    counter = Counter()

    def count(module, args):
        counter.calls += 1

    network.get_submodule(leaf).register_forward_pre_hook(count)
    return counter


def pruned(network, leaf):
    torch.manual_seed(3)
    prune.random_unstructured(network.get_submodule(leaf), 'weight', amount=0.5)


def weight_norm(network, leaf):
    module = nn.utils.parametrizations.weight_norm(network.get_submodule(leaf))
    with torch.no_grad():
        module.parametrizations.weight.original0 *= 1 + noise_like(module.parametrizations.weight.original0) / 2
        module.parametrizations.weight.original1 += noise_like(module.weight)


def old_weight_norm(network, leaf):
    module = nn.utils.weight_norm(network.get_submodule(leaf))
    with torch.no_grad():
        module.weight_g *= 1 + noise_like(module.weight_g) / 2
        module.weight_v += noise_like(module.weight)


def int8(network, leaf):
    module = network.get_submodule(leaf)
    module.weight = nn.Parameter(Int8Weight(module.weight.detach() + noise_like(module.weight)), requires_grad=False)


CHANGES = {
    'hook': hook,
    'pre_hook': pre_hook,
    'adapter': lambda network, leaf: replace(network, leaf, Adapter),
    'replaced': lambda network, leaf: replace(network, leaf, Replacement),
}
WEIGHT_CHANGES = {
    'parametrized': parametrized,
    'pruned': pruned,
    'weight_norm': weight_norm,
    'old_weight_norm': old_weight_norm,
    'int8': int8,
}


def build(name, with_cp, leaf=None, change=None):
    """A network with random parameters, and what counts the calls of the changed module."""
    torch.manual_seed(0)
    network, counter = NETWORKS[name][0](with_cp), None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if change is not None:
        counter = change(network, leaf) or counted(network, leaf)
        counter.calls = 0
    return network, counter


def run(name, mode, stored=False, leaf=None, change=None):
    """Outputs and gradients of two steps, and calls of the changed module in their forward passes.

    With ``stored`` all modules are called, and all tensors kept for backward.
    """
    network, counter = build(name, mode == 'with_cp', leaf, change)
    trains = mode != 'inference'
    network.train(trains)
    x = torch.randn(NETWORKS[name][1], requires_grad=trains)
    results, calls = [], 0
    with pytest.MonkeyPatch.context() as patch:
        if stored:
            patch.setattr(fused, '_are_plain', lambda *modules: False)
        for _ in range(2):
            before = counter and counter.calls
            with torch.autocast('cpu', torch.bfloat16, enabled=mode == 'autocast'), torch.set_grad_enabled(trains):
                y = network(x)
            calls += counter.calls - before if counter else 0
            results.append(y.detach())
            if trains:
                (y.float() * noise_like(y)).sum().backward()
    return results + [t.grad for t in (x, *network.parameters()) if t.grad is not None], calls


def check(name, leaf, change, mode):
    results, calls = run(name, mode, leaf=leaf, change=change)
    expected, _ = run(name, mode, stored=True, leaf=leaf, change=change)
    assert calls == 2
    assert len(results) == len(expected)
    largest = max(truth.float().norm() for truth in expected)
    for value, truth in zip(results, expected):
        error, size = (value.float() - truth.float()).norm(), truth.float().norm()
        # Some gradients are rounding errors alone, such as that of a bias before BatchNorm.
        assert error <= (5e-2 if mode == 'autocast' else 3e-5) * (size + largest / 100)
    unchanged, _ = run(name, mode)
    assert (results[0] - unchanged[0]).abs().max() > 1e-4 * unchanged[0].abs().max()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name, leaf', LEAVES)
def test_changed_module_runs_once_and_trains_as_it_says(name, leaf, change, mode):
    check(name, leaf, CHANGES[change], mode)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('change', WEIGHT_CHANGES)
@pytest.mark.parametrize('name, leaf', WEIGHTED)
def test_changed_weight_has_its_effect(name, leaf, change, mode):
    check(name, leaf, WEIGHT_CHANGES[change], mode)


@pytest.mark.parametrize('name, leaf', LEAVES)
def test_backward_hooks_fire_once_and_change_gradients(name, leaf):
    network, _ = build(name, with_cp=False)
    calls = []

    def double(module, grad_inputs, grad_outputs):
        calls.append('hook')
        return tuple(2 * grad for grad in grad_inputs)

    network.get_submodule(leaf).register_full_backward_hook(double)
    network.get_submodule(leaf).register_full_backward_pre_hook(lambda module, grads: calls.append('pre'))
    results = []
    for stored in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if stored:
                patch.setattr(fused, '_are_plain', lambda *modules: False)
            torch.manual_seed(1)
            x = torch.randn(NETWORKS[name][1], requires_grad=True)
            network(x).sin().sum().backward()
            results.append(x.grad)
    assert calls == ['pre', 'hook'] * 2
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
