import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmspatialmamba.engine import CPUAmpOptimWrapper
from mmspatialmamba.models import SpatialMamba


class Model(nn.Module):
    """A head, and a backbone under the name ``trunk``; they are not called by way of ``forward``."""

    def __init__(self, trunk='backbone'):
        super().__init__()
        self.add_module(trunk, nn.Linear(3, 2))
        self.trunk = trunk
        # A name that ends in "neck", as in mmseg's heads.
        self.bottleneck = nn.Linear(2, 1)

    def features(self, x):
        feature = self.get_submodule(self.trunk)(x)
        return feature, self.bottleneck(feature.float())


def build(model, **kwargs):
    return build_optim_wrapper(model, dict(type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1), **kwargs))


def dtypes_of(modules):
    """The set of the dtypes in which modules compute from now on."""
    dtypes = set()
    for module in modules:
        module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    return dtypes


@pytest.mark.parametrize('trunk', ['backbone', 'text_backbone', 'neck'])
def test_features_are_computed_in_bfloat16_and_the_rest_in_float32(trunk):
    model = Model(trunk)
    layer = model.get_submodule(trunk)
    wrapper = build(model, loss_scale='dynamic', use_fsdp=True)
    assert isinstance(wrapper, CPUAmpOptimWrapper)
    image, before = torch.rand(4, 3), layer.weight.detach().clone()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = layer(image)
    with wrapper.optim_context(model):
        feature, loss = model.features(image)
    assert expected.dtype == torch.bfloat16
    assert feature.dtype == torch.float32
    torch.testing.assert_close(feature, expected.float(), rtol=0, atol=0)
    torch.testing.assert_close(loss, model.bottleneck(expected.float()), rtol=0, atol=0)
    wrapper.update_params(loss.sum())
    assert not torch.equal(layer.weight, before)


def test_a_model_without_backbone_is_run_in_bfloat16_as_a_whole():
    model = Model('encoder')
    with build(model).optim_context(model):
        feature, loss = model.features(torch.ones(1, 3))
    assert feature.dtype == loss.dtype == torch.bfloat16


@pytest.mark.parametrize('own_forward', [False, True])
def test_leaves_the_model_as_it_was(own_forward):
    model = Model()
    if own_forward:
        model.backbone.forward = own = lambda x: x[:, :2]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), build(model).optim_context(model):
        raise ZeroDivisionError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not own_forward or model.backbone.forward is own
    assert model.features(torch.ones(1, 3))[0].dtype == torch.float32


def test_a_copy_made_inside_has_its_own_weights():
    model = Model()
    with build(model).optim_context(model):
        other = copy.deepcopy(model)
    nn.init.zeros_(other.backbone.weight)
    nn.init.zeros_(other.backbone.bias)
    assert not other.features(torch.ones(1, 3))[0].any()


@pytest.mark.parametrize('dtype', ['float16', torch.float16, None])
def test_other_dtypes_are_errors(dtype):
    with pytest.raises(ValueError, match="dtype must be 'bfloat16', but is .*"):
        build(Model(), dtype=dtype)


def test_bfloat16_is_taken_as_a_dtype():
    build(Model(), dtype=torch.bfloat16)


PREPROCESSOR = dict(type='SelfSupDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3)
BACKBONE = dict(type='SpatialMamba', arch=dict(embed_dims=8, depths=(1, 1)), out_indices=(1,), drop_path_rate=0.0)
NECK = dict(type='NonLinearNeck', in_channels=16, hid_channels=16, out_channels=16, num_layers=2)
PREDICTOR = dict(NECK, hid_channels=8, with_avg_pool=False)
HEAD = dict(type='LatentPredictHead', loss=dict(type='CosineSimilarityLoss'), predictor=PREDICTOR)
ALGORITHMS = {
    'SimSiam': dict(
        type='SimSiam',
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONE,
        neck=NECK,
        head=dict(HEAD, predictor=dict(PREDICTOR, with_last_bn=False)),
    ),
    'BYOL': dict(
        type='BYOL',
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONE,
        neck=NECK,
        head=HEAD,
    ),
    'MoCo': dict(
        type='MoCo',
        queue_len=8,
        feat_dim=16,
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONE,
        neck=dict(type='MoCoV2Neck', in_channels=16, hid_channels=16, out_channels=16),
        head=dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss'), temperature=0.2),
    ),
    'LoRAModel': dict(
        type='LoRAModel',
        alpha=4,
        rank=2,
        targets=[dict(type='.*in_proj')],
        module=dict(
            type='ImageClassifier',
            data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3),
            backbone=BACKBONE,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=16),
        ),
    ),
}


class Distiller(BaseModel):
    """A user's own algorithm, whose models are in a list."""

    def __init__(self):
        super().__init__()
        self.pair = nn.ModuleList(MODELS.build(BACKBONE) for _ in range(2))

    def forward(self, inputs, data_samples, mode):
        student, teacher = (model(inputs[0].float())[0] for model in self.pair)
        return dict(loss=(student - teacher.detach()).square().mean())


@pytest.mark.parametrize('name', [*ALGORITHMS, 'Distiller'])
def test_backbones_of_any_algorithm_are_trained_in_bfloat16(name):
    from mmpretrain.registry import MODELS
    from mmpretrain.structures import DataSample

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = Distiller() if name == 'Distiller' else MODELS.build(ALGORITHMS[name])
    wrapper = build(model)
    backbones = [module for module in model.modules() if isinstance(module, SpatialMamba)]
    assert len(backbones) == (1 if name in ('SimSiam', 'LoRAModel') else 2)
    dtypes = dtypes_of(
        module
        for backbone in backbones
        for block in backbone.stages[0]
        for module in (block.mixer.in_proj, block.mlp.fc1)
    )
    outputs = []
    for backbone in backbones:
        backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0].dtype))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(i % 2) for i in range(4)]
    inputs = images if name == 'LoRAModel' else [images, images.flip(-1)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = model.train().train_step(dict(inputs=inputs, data_samples=samples), wrapper)
    assert dtypes == {torch.bfloat16}
    assert set(outputs) == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
