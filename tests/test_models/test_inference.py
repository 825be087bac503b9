"""Without gradients, the layers run in fewer ops and compute the same."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from mmspatialmamba import ops
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import inference

pytestmark = pytest.mark.skipif(
    'native' not in ops.available_backends() or torch.ops.mmspatialmamba_native.instruction_set() == 'baseline',
    reason='needs the compiled ops, and a CPU with AVX2',
)
SMALL = dict(embed_dims=16, depths=(1, 2, 1, 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SpatialMamba(SMALL)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.fixture
def fused(monkeypatch):
    """Names of the layers that were fused."""
    names = []
    for name in ('block', 'stem', 'downsample', 'output_norm'):
        function = getattr(inference, name)
        monkeypatch.setattr(inference, name, lambda *args, f=function, n=name: names.append(n) or f(*args))
    return names


def relative_difference(a, b):
    """The largest of some tensors; NaN where one has a NaN."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(a, b, strict=True)]).max().item()


@pytest.mark.parametrize('size', [(1, 1), (3, 65), (64, 96), (130, 34)], ids=str)
def test_outputs_are_those_of_the_modules(model, fused, size):
    image = torch.randn(2, 3, *size)
    expected = [output.detach() for output in model(image)]
    assert fused == []
    with torch.no_grad():
        outputs = model(image)
    assert fused.count('block') == 5 and fused.count('stem') == 1 and fused.count('downsample') == 3
    assert fused.count('output_norm') == 4
    assert relative_difference(outputs, expected) < 1e-5
    assert [o.stride() for o in outputs] == [e.stride() for e in expected]


@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'weights'])
def test_in_bfloat16(model, fused, autocast):
    image = torch.randn(2, 3, 64, 96)
    if not autocast:
        model, image = model.bfloat16(), image.bfloat16()
    outputs = []
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        outputs.append(model(image))
        count = len(fused)
        # A hook makes them call their modules.
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        outputs.append(model(image))
        handle.remove()
    assert fused.count('block') == 5 and fused.count('stem') == 1 and fused.count('downsample') == 3
    assert len(fused) == count
    assert [o.dtype for o in outputs[0]] == [o.dtype for o in outputs[1]]
    assert all(output.isfinite().all() for output in outputs[0])
    assert relative_difference(*([o.float() for o in one] for one in outputs)) < 2e-2


@pytest.mark.parametrize('layer', ['stem', 'downsamples.0'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_layers_cast_as_autocast_does(model, fused, layer, dtype):
    layer = model.get_submodule(layer)
    x = torch.randn(2, 3 if layer is model.stem else 16, 12, 9, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        expected = layer(x)
        with torch.no_grad():
            out = layer(x)
    assert len(fused) == 1 and out.dtype == expected.dtype == torch.bfloat16
    assert relative_difference([out.float()], [expected.float()]) < 2e-2


def test_autocast_in_float16_calls_the_modules(model, fused):
    with torch.no_grad(), torch.autocast('cpu', torch.float16):
        outputs = model(torch.randn(1, 3, 32, 32))
    assert fused == [] and all(output.isfinite().all() for output in outputs)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='what is measured is glibc')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_not_given_back_and_asked_for_again(dtype):
    """Page faults of a forward pass, once the first ones are done. Layers hold 10 to 20 MB at a time."""
    code = """if True:
        import resource, sys, torch
        from mmspatialmamba.models import SpatialMamba
        dtype = getattr(torch, sys.argv[1])
        model = SpatialMamba(dict(embed_dims=64, depths=(2, 2, 1, 1))).eval().to(dtype)
        image = torch.randn(1, 3, 384, 384, dtype=dtype)
        count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.no_grad():
            for _ in range(5):
                model(image)
            before = count()
            for _ in range(4):
                model(image)
        print((count() - before) / 4)
    """
    command = [sys.executable, '-c', code, str(dtype).removeprefix('torch.')]
    environment = {**os.environ, 'MMSPATIALMAMBA_BACKEND': 'native'}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(result.stdout) < 1000


def test_dtype_under_autocast_is_that_of_the_modules(model, fused):
    block, x = model.stages[0][0], torch.randn(1, 16, 5, 6)
    with torch.autocast('cpu', torch.bfloat16):
        trained = block(x)
        with torch.no_grad():
            out = block(x)
            block.ln1.register_forward_hook(lambda *args: None)
            expected = block(x)
    assert out.dtype == trained.dtype and torch.equal(out, expected) and fused == []
    assert relative_difference([out], [trained]) < 1e-4


def test_other_strides_are_kept(model, fused):
    image = torch.randn(1, 3, 48, 32)
    model.stem.conv1.conv.stride = model.downsamples[1][1].conv.stride = (1, 1)
    expected = [output.detach() for output in model(image)]
    assert [output.shape[2:] for output in expected] == [(24, 16), (12, 8), (12, 8), (6, 4)]
    with torch.no_grad():
        assert relative_difference(model(image), expected) < 1e-5
    assert fused.count('stem') == 0 and fused.count('downsample') == 2


def test_without_norms(fused):
    model, image = SpatialMamba(SMALL, norm_cfg=None).eval(), torch.randn(1, 3, 32, 32)
    expected = [output.detach() for output in model(image)]
    with torch.no_grad():
        assert relative_difference(model(image), expected) < 1e-5
    assert fused.count('stem') == 1


def test_hooks_within_a_layer_are_called(model, fused):
    seen = []
    hooks = [
        model.stages[1][0].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape)),
        model.stem.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 8, 16, 16), (1, 4, 4, 128)]
    assert fused.count('block') == 4 and 'stem' not in fused
    for hook in hooks:
        hook.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    fused.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    handle.remove()
    assert fused == []


def test_hooks_of_stages_are_called(model, fused):
    seen = []
    model.stages[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 32, 4, 4), (1, 2, 2, 64)]
    assert fused.count('block') == 5 and fused.count('output_norm') == 0


@pytest.mark.parametrize('indices, norms', [((1,), 1), ((0, 2), 2), (3, 1)], ids=str)
def test_some_stages(fused, indices, norms):
    model, image = SpatialMamba(SMALL, out_indices=indices).eval(), torch.randn(1, 3, 32, 32)
    expected = [output.detach() for output in model(image)]
    with torch.no_grad():
        assert relative_difference(model(image), expected) < 1e-5
    assert fused.count('output_norm') == norms == len(expected)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def double(module):
    module.forward = lambda x: type(module).forward(module, x) * 2


def set_attribute(module, name, value):
    setattr(module, name, value)


# What does not change the types of the modules within, or not to others.
CHANGES = {
    'forward of a convolution': lambda model: double(model.stem.conv1.conv),
    'forward of a norm': lambda model: double(model.stages[0][0].ln1),
    'forward of a product': lambda model: double(model.stages[0][0].mlp.fc1),
    'padding': lambda model: set_attribute(model.stem.conv2[0].conv, 'padding_mode', 'reflect'),
    'groups': lambda model: set_attribute(
        model.stem.conv2[0], 'conv', type(model.stem.conv2[0].conv)(8, 8, 3, 1, 1, groups=2, bias=False)
    ),
    'BatchNorm': lambda model: set_attribute(model.stem.conv1, 'norm', Doubled(8).eval()),
    'bias of a product': lambda model: set_attribute(
        model.stages[0][0].mixer.out_proj, 'bias', nn.Parameter(torch.ones(16))
    ),
    'no norm': lambda model: set_attribute(model.stages[0][0], 'ln1', nn.Identity()),
    'norm without parameters': lambda model: set_attribute(
        model.stages[0][0], 'ln2', nn.LayerNorm(16, elementwise_affine=False, eps=1.0)
    ),
    'no activation': lambda model: delattr(model.stem.conv1, 'act'),
    'activation': lambda model: model.downsamples[0][2].add_module('act', nn.ReLU()),
    'output norm': lambda model: set_attribute(model, 'norm0', nn.Identity()),
    'block': lambda model: model.stages[0].append(nn.GELU()),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_modules_are_called(model, change):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
    CHANGES[change](model)
    expected = [output.detach() for output in model.eval()(image)]
    with torch.no_grad():
        outputs = model(image)
    assert relative_difference(outputs, expected) < 1e-5
    assert relative_difference(outputs, before) > 1e-4


def own_ops(graph):
    targets = (str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
    return [target.split('.')[1] for target in targets if target.startswith('mmspatialmamba_native.')]


@pytest.fixture
def compiler():
    """Compiles as ``aot_eager`` does, and keeps the names of each graph's own ops in ``graphs``."""

    def compile_graph(graph, inputs):
        compile_graph.graphs.append(own_ops(graph))
        return aot_eager(graph, inputs)

    compile_graph.graphs = []
    torch._dynamo.reset()
    yield compile_graph
    torch._dynamo.reset()


FUSED = ['stem', 'block', 'layer_norm_planes']
FUSED += ['downsample', 'block', 'block', 'layer_norm_planes', *['downsample', 'block', 'layer_norm_planes'] * 2]


@pytest.mark.parametrize('mode', ['float32', 'autocast', 'bfloat16'])
def test_compiled_layers_are_fused(model, compiler, mode):
    dtype = torch.bfloat16 if mode == 'bfloat16' else torch.float32
    compiled = torch.compile(model.to(dtype), fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=mode == 'autocast'):
        counts = []
        for size in [(2, 3, 64, 48), (3, 3, 70, 33)]:
            image = torch.randn(size, dtype=dtype)
            outputs, expected = compiled(image), model(image)
            counts.append(len(compiler.graphs))
            assert all(torch.equal(o, e) for o, e in zip(outputs, expected))
            assert [(o.dtype, o.stride()) for o in outputs] == [(e.dtype, e.stride()) for e in expected]
    assert compiler.graphs[-1] == FUSED and counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.usefixtures('compiler')
def test_compiled_by_inductor(model):
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(2, 3, 64, 48), (3, 3, 70, 33)]:
            image = torch.randn(size)
            assert all(torch.equal(o, e) for o, e in zip(compiled(image), model(image)))


def two_stages():
    torch.manual_seed(0)
    return SpatialMamba(dict(embed_dims=16, depths=(1, 1)), out_indices=(0, 1)).eval()


def test_compiled_layers_that_need_gradients_are_not_fused(compiler):
    model = two_stages()
    sum(output.sum() for output in torch.compile(model, backend=compiler)(torch.randn(1, 3, 32, 32))).backward()
    assert len(compiler.graphs) == 1 and not set(FUSED) & set(compiler.graphs[0])
    assert {'linear', 'gelu_linear', 'downsampling_conv'} < set(compiler.graphs[0])
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('change', [*CHANGES, 'hook', 'training', 'weight'])
def test_compiled_code_heeds_later_changes(compiler, change):
    changes = {
        **CHANGES,
        'hook': lambda model: model.stages[1][0].ln1.register_forward_hook(lambda module, args, out: out * 2),
        'training': lambda model: model.stem.conv1.norm.train(),
        'weight': lambda model: model.stages[1][0].ln1.weight.mul_(2),
    }
    model = two_stages()
    compiled, image = torch.compile(model, backend=compiler), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = compiled(image)
        assert compiler.graphs[-1].count('block') == 2
        changes[change](model)
        outputs, expected = compiled(image), copy.deepcopy(model)(image)
    assert relative_difference(outputs, expected) < 1e-5
    assert relative_difference(outputs, before) > 1e-4


@pytest.mark.parametrize('strict', [False, True], ids=['non-strict', 'strict'])
def test_exported_layers_are_not_fused(model, strict):
    """What is exported has PyTorch's own where there are any."""
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 64, 48),), strict=strict)
    assert not {*FUSED, 'linear', 'gelu_linear'} & set(own_ops(exported.graph_module))


def test_fewer_stages_than_outputs(model):
    model.stages = model.stages[:2]
    with torch.no_grad(), pytest.raises(IndexError):
        model(torch.randn(1, 3, 32, 32))


def test_statistics_taken_away(model, fused):
    """As test-time adaptation does it: norms then use the images' own."""
    norm, image = model.stem.conv1.norm, torch.randn(2, 3, 32, 32)
    norm.running_mean = norm.running_var = None
    expected = [output.detach() for output in model(image)]
    with torch.no_grad():
        assert relative_difference(model(image), expected) < 1e-5
    assert 'stem' not in fused


@pytest.mark.parametrize('name', ['running_mean', 'running_var'])
def test_one_statistic_taken_away(model, name):
    setattr(model.stem.conv1.norm, name, None)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f'{name} must be defined in evaluation mode'):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize('layer', ['fc1', 'fc2'])
@pytest.mark.parametrize('requires_grad', [True, False])
def test_a_bias_taken_away(model, layer, requires_grad):
    mlp, image = model.stages[0][0].mlp, torch.randn(1, 3, 32, 32)
    linear = getattr(mlp, layer)
    nn.init.zeros_(linear.bias)
    expected = [output.detach() for output in model(image)]
    linear.bias = None
    with torch.set_grad_enabled(requires_grad):
        assert relative_difference(model(image), expected) < 1e-5


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_vmap_over_models(model, fused):
    models, image = [model, copy.deepcopy(model)], torch.randn(2, 3, 32, 32)
    nn.init.normal_(models[1].norm1.weight)
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        run = torch.vmap(lambda *state: torch.func.functional_call(model, state, (image,)))
        outputs = run(parameters, buffers)
        assert fused == []
        for i, one in enumerate(models):
            assert relative_difference([output[i] for output in outputs], one(image)) < 1e-5


@pytest.mark.parametrize('grad', [True, False], ids=['grad', ''])
@pytest.mark.parametrize('name', ['mixer.in_proj', 'mixer.out_proj', 'mlp.fc1', 'mlp.fc2'])
def test_replaced_modules_are_called(model, fused, name, grad):
    class Adapted(nn.Module):
        """As LoRA's modules, which hold the one that they replace."""

        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) + 1

    block, image = model.stages[2][0], torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        before = model(image)
        fused.clear()
        parent, child = name.split('.')
        module = block.get_submodule(parent)
        setattr(module, child, Adapted(getattr(module, child)))
        outputs = model(image)
        getattr(module, child).forward = getattr(module, child).linear.forward
        unchanged = model(image)
    assert relative_difference(outputs, before) > 1e-3
    assert relative_difference(unchanged, before) < 1e-5
    assert fused.count('block') == (0 if grad else 8)


@pytest.mark.parametrize('register', ['register_forward_hook', 'register_full_backward_hook'])
@pytest.mark.parametrize(
    'name',
    ['stages.1.0.mixer.in_proj', 'stages.1.0.mlp.fc1', 'stages.1.0.mlp.fc2', 'downsamples.1.1', 'downsamples.1.0.act'],
)
def test_hooks_are_called_in_training(model, name, register):
    calls = []
    getattr(model.get_submodule(name), register)(lambda *args: calls.append(name))
    sum(output.sum() for output in model.train()(torch.randn(2, 3, 32, 32))).backward()
    assert calls == [name]


def test_global_hooks_are_called_in_training(model):
    modules = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: modules.append(module))
    model.train()(torch.randn(2, 3, 32, 32))
    handle.remove()
    block = model.stages[1][0]
    assert {block.mixer.in_proj, block.mlp.fc1, block.mlp.fc2} < set(modules)


def test_layers_in_training_mode_are_not_fused(model, fused):
    model.train()
    before = model.stem.conv1.norm.running_mean.clone()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert fused == []
    assert not torch.equal(model.stem.conv1.norm.running_mean, before)


def test_other_norms_are_not_folded(fused):
    model = SpatialMamba(SMALL, norm_cfg=dict(type='GN', num_groups=2)).eval()
    image = torch.randn(1, 3, 32, 32)
    expected = [output.detach() for output in model(image)]
    with torch.no_grad():
        assert relative_difference(model(image), expected) < 1e-5
    assert fused == ['block'] * 5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_not_fused(model, fused, dtype):
    with torch.no_grad():
        outputs = model.to(dtype)(torch.randn(1, 3, 32, 32, dtype=dtype))
    assert fused == []
    assert all(output.dtype == dtype and output.isfinite().all() for output in outputs)


def test_mixed_dtypes_are_not_fused(model, fused):
    model.stages[0][0].mixer.D.data = model.stages[0][0].mixer.D.data.bfloat16()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert fused.count('block') == 4
