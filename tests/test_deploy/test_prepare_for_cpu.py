"""Copies prepared for CPU inference: the model's outputs, and what is refused."""

import copy
import pickle

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn
from torch.nn.utils import parametrize

from mmspatialmamba.deploy import cpu, prepare_for_cpu
from mmspatialmamba.models import SpatialMamba

SMALL = dict(embed_dims=8, depths=(1, 2, 1))
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def small(**kwargs):
    """A backbone with statistics and parameters that differ from their initial values."""
    torch.manual_seed(0)
    model = SpatialMamba(SMALL, out_indices=(0, 2), **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for _ in range(3):
        model.train()(torch.randn(2, 3, 40, 56))
    return model.eval()


def error(prepared, model, images):
    with torch.no_grad():
        pairs = zip(prepared(images), model(images))
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize('size', [(64, 96), (37, 41), (1, 1), (5, 130)], ids=str)
def test_equals_the_model(size):
    model = small()
    prepared = prepare_for_cpu(model)
    for batch in (1, 3):
        assert error(prepared, model, torch.randn(batch, 3, *size)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_published_sizes(arch):
    torch.manual_seed(0)
    model = SpatialMamba(arch).eval()
    assert error(prepare_for_cpu(model), model, torch.randn(1, 3, 96, 128)) < 1e-5


@pytest.mark.skipif(not HAS_BFLOAT16, reason='needs a CPU with bfloat16 instructions')
def test_bfloat16_weights():
    model = small()
    prepared = prepare_for_cpu(copy.deepcopy(model).to(torch.bfloat16))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for output, expected in zip(prepared(images.to(torch.bfloat16)), model(images)):
            assert output.dtype == torch.bfloat16
            assert (output - expected).abs().max() < 6e-2 * expected.abs().max()


def test_the_model_is_untouched_and_the_copy_independent():
    model = small()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    prepared = prepare_for_cpu(model)
    outputs = prepared(images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(prepared(images), outputs))
    assert not any(output.requires_grad for output in outputs)


def test_whole_models_keep_their_other_parts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.ModuleDict({'backbone': small()})
            self.teacher, self.head = small(in_channels=3), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.student['backbone'](x)[0]), self.head(self.teacher(x)[0])

    model = Model().eval()
    prepared = prepare_for_cpu(model)
    assert type(prepared) is Model and type(prepared.teacher) is SpatialMamba
    assert error(prepared, model, torch.randn(1, 3, 40, 40)) < 1e-5


def hook(model):
    model.stages[1][0].mixer.out_norm.register_forward_hook(lambda module, args, out: out)


def backward_hook(model):
    model.downsamples[0].register_full_backward_hook(lambda module, grad_input, grad_output: None)


def patch(model):
    model.stem.forward = lambda x: x


def parametrization(model):
    parametrize.register_parametrization(model.stages[0][0].mlp.fc1, 'weight', nn.Identity())


def put(path, build):
    """A change that puts another module in a module's place."""

    def change(model):
        parent, _, name = path.rpartition('.')
        setattr(model.get_submodule(parent), name, build(model.get_submodule(path)))

    return change


def dilated(conv):
    return nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)


CHANGED = {
    'hook': (hook, r'stages.1.0.mixer.out_norm has hooks or a forward of its own'),
    'backward hook': (backward_hook, r'downsamples.0 has hooks or a forward of its own'),
    'forward': (patch, r'stem has hooks or a forward of its own'),
    'parametrized': (parametrization, r'stages.0.0.mlp.fc1 is ParametrizedLinear\(.*\), not Linear\('),
    'wrapped': (
        put('stages.0.0.mixer.in_proj', nn.Sequential),
        r'stages.0.0.mixer.in_proj is Sequential\(\), not Linear\(',
    ),
    'bias': (
        put('stages.0.0.mixer.dt_proj', lambda linear: nn.Linear(1, 16)),
        r'stages.0.0.mixer.dt_proj is Linear\(.*bias=True\), not Linear\(.*bias=False\)',
    ),
    'activation': (put('stem.conv1.act', lambda act: nn.Identity()), r'stem.conv1.act is Identity\(\), not ReLU\(\)'),
    'removed': (lambda model: delattr(model.stem.conv1, 'act'), r'stem.conv1.act is nothing, not ReLU\(\)'),
    'added': (
        lambda model: model.stages[0].append(nn.Identity()),
        r'stages.0.1 is Identity\(\), not nothing',
    ),
    'geometry': (put('stages.0.0.cpe1', dilated), r'stages.0.0.cpe1 is Conv2d\(.*dilation=\(2, 2\).*, not Conv2d\('),
    'drop path': (put('stages.0.0.drop_path1', lambda drop: nn.Linear(8, 8)), r'stages.0.0.drop_path1 is Linear\('),
    'statistics': (
        lambda model: setattr(model.stem.conv1.norm, 'running_var', None),
        r'stem.conv1.norm is BatchNorm2d\(.*\) without running statistics',
    ),
    'norm': (put('stem.conv1.norm', lambda norm: nn.GroupNorm(2, 4)), r'stem.conv1.norm is GroupNorm\('),
}
REFUSED = {
    **{name: (change, message + '.*, which a prepared copy would lose') for name, (change, message) in CHANGED.items()},
    'training': (lambda model: model.train(), r'the backbone is in training mode: call model.eval\(\) first'),
    'part in training': (lambda model: model.stages[1].train(), r'stages.1 is in training mode'),
    'gpu': (lambda model: model.stages[2].to('meta'), r'stages\.2\.\S+ is on meta: move the model with .cpu'),
    'float64': (lambda model: model.double(), r'\S+ is torch.float64: the whole backbone must be float32, or bfloat16'),
    'mixed': (lambda model: model.stages[0].bfloat16(), r'stages.0\S+ is torch.bfloat16: the whole backbone'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refuses_in_one_line(case):
    change, message = REFUSED[case]
    model = small()
    change(model)
    with pytest.raises(ValueError, match='^prepare_for_cpu: ' + message) as caught:
        prepare_for_cpu(model)
    assert '\n' not in str(caught.value)


def test_refuses_what_holds_no_backbone():
    with pytest.raises(ValueError, match='Linear holds no SpatialMamba backbone'):
        prepare_for_cpu(nn.Linear(2, 2).eval())


def test_refuses_a_wrapped_model(monkeypatch):
    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    with pytest.raises(ValueError, match='MMDistributedDataParallel wraps the model: pass its .module'):
        prepare_for_cpu(wrapper)


def test_refuses_a_torch_without_the_ops(monkeypatch):
    class Older:
        _linear_pointwise = None

    monkeypatch.setattr(cpu.torch.ops, 'mkldnn', Older())
    with pytest.raises(RuntimeError, match='lacks _convolution_pointwise, .*: use the model as it is'):
        prepare_for_cpu(small())


def test_refuses_a_processor_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    with pytest.raises(RuntimeError, match='this processor has no bfloat16 instructions'):
        prepare_for_cpu(small().bfloat16())


def test_a_prepared_copy_is_for_inference_alone():
    prepared = prepare_for_cpu(small())
    images = torch.rand(1, 3, 32, 32)
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match='cannot be copied or pickled: prepare the original again'):
            action(prepared)
    with pytest.raises(RuntimeError, match='holds no weights to save: save the original'):
        prepared.state_dict()
    with pytest.raises(RuntimeError, match='has no gradients: use the original'):
        prepared(images.clone().requires_grad_())
    with pytest.raises(RuntimeError, match='has no gradients: use the original'):
        torch.func.jvp(prepared, (images,), (images,))
    with pytest.raises(ValueError, match=r'stem is _Stem\(\), not Stem\(\)'):
        prepare_for_cpu(prepared)
    with pytest.raises(RuntimeError, match='cannot be trained: train the original'):
        prepared.train()


def test_images_are_converted():
    prepared = prepare_for_cpu(small())
    images = torch.rand(1, 3, 32, 32).bfloat16()
    for output, expected in zip(prepared(images), prepared(images.float())):
        assert torch.equal(output, expected)
