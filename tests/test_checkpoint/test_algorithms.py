"""The libraries' algorithms, which wrap, copy and rename backbones: what they load, and what is loaded from theirs."""

from __future__ import annotations

import importlib

import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from test_checkpoint.files import ARCH, classifier_state, published_classifier, same, small, snapshot
from test_checkpoint.test_audit import audits, run_hook
from test_checkpoint.test_refusals import Model
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError, register_checkpoint_loaders

CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(type='SpatialMamba', arch=ARCH, out_indices=-1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
)
# The config of each, and the prefix of its other backbone.
SELF_SUPERVISED = {
    'MoCo': ('mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py', 'encoder_k.module.0.'),
    'BYOL': ('byol/byol_resnet50_16xb256-coslr-200e_in1k.py', 'target_net.module.0.'),
    'DenseCL': ('densecl/densecl_resnet50_8xb32-coslr-200e_in1k.py', 'encoder_k.module.0.'),
    'SimCLR': ('simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py', 'backbone.'),
}


def load_config(library: str, name: str) -> Config:
    init_default_scope(library)
    return Config.fromfile(Config._get_cfg_path(f'{library}::{name}', '')[0]).model


def build(library: str, cfg: dict) -> nn.Module:
    init_default_scope(library)
    importlib.import_module(f'{library}.models')
    return importlib.import_module(f'{library}.registry').MODELS.build(cfg)


@pytest.fixture(scope='module')
def soft_teacher() -> dict:
    cfg = load_config('mmdet', 'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py')
    cfg.detector.backbone = dict(type='SpatialMamba', arch=ARCH)
    cfg.detector.neck.in_channels = [8, 16, 32, 64]
    cfg.detector.roi_head.bbox_head.fc_out_channels = 8
    return cfg


def save(state: dict, path) -> str:
    torch.save({'state_dict': state, 'meta': {}}, path)
    return str(path)


def test_soft_teacher_from_a_detector(soft_teacher, tmp_path):
    state = build('mmdet', soft_teacher.detector).state_dict()
    model, path = build('mmdet', soft_teacher), save(state, tmp_path / 'detector.pth')
    before = snapshot(model)
    assert ' missing' not in run_hook(model, path, tmp_path)
    for part in (model.student, model.teacher):
        assert same(part.state_dict(), state)
    del state['neck.lateral_convs.0.conv.bias']
    path, model = save(state, tmp_path / 'x.pth'), build('mmdet', soft_teacher)
    before = snapshot(model)
    says = r': 2 missing from the file \(first: student.neck.lateral_convs.0.conv.bias\)'
    with pytest.raises(CheckpointError, match=says):
        run_hook(model, path, tmp_path)
    assert same(snapshot(model), before)


def test_soft_teacher_from_a_classifier_and_from_its_own_training(soft_teacher, tmp_path):
    torch.save(published_classifier(), tmp_path / 'classifier.pth')
    model = build('mmdet', soft_teacher)
    log = run_hook(model, str(tmp_path / 'classifier.pth'), tmp_path)
    parts = [f'{name}.{part}' for name in ('student', 'teacher') for part in ('neck', 'rpn_head', 'roi_head')]
    assert f'; fresh: 8 output norms, {", ".join(parts)}\n' in log
    assert 'do not match' not in log
    for part in (model.student, model.teacher):
        assert torch.equal(
            part.backbone.stages[2][1].mixer.D, classifier_state()['layers.2.blocks.1.self_attention.Ds']
        )
    path, again = save(model.state_dict(), tmp_path / 'own.pth'), build('mmdet', soft_teacher)
    assert 'fresh' not in run_hook(again, path, tmp_path / 'again')
    assert same(snapshot(again), snapshot(model))


@pytest.mark.parametrize('name', SELF_SUPERVISED)
def test_backbone_from_a_self_supervised_training(name, tmp_path):
    config, other = SELF_SUPERVISED[name]
    cfg = load_config('mmpretrain', config)
    cfg.backbone = {**CLASSIFIER['backbone']}
    cfg.neck.in_channels = 64
    if 'queue_len' in cfg:
        cfg.queue_len = 64
    source = build('mmpretrain', cfg)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = source.state_dict()
    path = save(state, tmp_path / 'x.pth')
    for prefix in ('backbone.', other):
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
        dense, classifier = small(init_cfg=init_cfg), small(out_indices=-1, init_cfg=init_cfg)
        before = snapshot(dense)
        dense.init_weights()
        for key, value in dense.state_dict().items():
            assert torch.equal(value, before[key] if key.startswith('norm') else state[prefix + key])
        classifier.init_weights()
        assert same(snapshot(classifier), {key: state[prefix + key] for key in classifier.state_dict()})
    again = build('mmpretrain', cfg)
    assert 'fresh' not in run_hook(again, path, tmp_path)
    assert same(snapshot(again), state)


@pytest.mark.parametrize('hook', [True, False], ids=['LoadAuditHook', 'load_checkpoint'])
def test_detector_from_a_self_supervised_training(hook, tmp_path, lines):
    source, model = Model(), Model()
    source.queue, source.encoder_k = nn.Linear(2, 2), nn.Sequential(small(out_indices=-1))
    path = save(source.state_dict(), tmp_path / 'x.pth')
    model.backbone, model.bbox_head = small(), model.head
    del model.head
    before = snapshot(model)
    if hook:
        assert '; fresh: 4 output norms, bbox_head\n' in run_hook(model, path, tmp_path)
    else:
        register_checkpoint_loaders()
        load_checkpoint(model, path, logger='current')
        assert [text.split('; ')[1] for _, text in audits(lines)] == ['fresh: 4 output norms']
    for key, value in model.state_dict().items():
        fresh = key.startswith(('backbone.norm', 'bbox_head'))
        assert torch.equal(value, before[key] if fresh else source.state_dict()[key])


class Renamed(Model):
    """A model whose checkpoints have other names than its modules."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict(dict(backbone=self.backbone, head=self.head))
        del self.backbone, self.head
        self._register_state_dict_hook(self._shorten)
        self._register_load_state_dict_pre_hook(self._lengthen)

    @staticmethod
    def _shorten(module, state, prefix, metadata):
        for name in list(state):
            state[name.replace('net.', '', 1)] = state.pop(name)

    @staticmethod
    def _lengthen(state, prefix, *args):
        for name in list(state):
            state[f'net.{name}'] = state.pop(name)


def wrapped():
    """A model of which a part is wrapped as for parallel training."""
    model = Model()
    model.backbone = nn.DataParallel(model.backbone)
    return model


@pytest.mark.parametrize('make', [Renamed, wrapped])
def test_names_of_checkpoints_and_of_modules_may_differ(make, tmp_path):
    source, model = Model(), make()
    path = save(source.state_dict(), tmp_path / 'x.pth')
    log = run_hook(model, path, tmp_path)
    assert 'all 178 parameters and 24 buffers' in log and 'fresh' not in log and 'do not match' not in log
    for value, expected in zip(model.parameters(), source.parameters()):
        assert torch.equal(value, expected)
    state = source.state_dict()
    del state['head.fc.bias'], state['backbone.norm3.weight']
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r'2 missing from the file \(first: backbone.norm3.weight\)'):
        run_hook(model, save(state, tmp_path / 'x.pth'), tmp_path)
    assert same(snapshot(model), before)


def test_an_average_in_the_model_is_a_part_of_it(tmp_path):
    def make():
        model = Model()
        model.average = ExponentialMovingAverage(model.backbone)
        return model

    source, model = make(), make()
    path = save(source.state_dict(), tmp_path / 'x.pth')
    assert 'fresh' not in run_hook(model, path, tmp_path)
    assert same(snapshot(model), snapshot(source))


def test_what_a_model_computes_while_it_loads_is_not_missing(tmp_path):
    source, model = Model(), Model()
    source.neck, model.neck = nn.Conv2d(3, 4, 3), ConvAWS2d(3, 4, 3)
    assert ' missing' not in run_hook(model, save(source.state_dict(), tmp_path / 'x.pth'), tmp_path)
    weight = source.neck.weight
    assert torch.equal(model.neck.weight, weight)
    torch.testing.assert_close(model.neck.weight_beta.flatten(), weight.flatten(1).mean(1))
    torch.testing.assert_close(model.neck._get_weight(model.neck.weight), weight)


def test_lora_loads_what_it_saves(tmp_path):
    backbone = dict(type='LoRAModel', module=CLASSIFIER['backbone'], rank=2, targets=[dict(type='in_proj')])
    source, model = (build('mmpretrain', {**CLASSIFIER, 'backbone': dict(backbone)}) for _ in range(2))
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = source.state_dict()
    assert 'backbone.module.stages.0.0.mixer.in_proj.lora_down.weight' in state and len(state) == 12
    log = run_hook(model, save(state, tmp_path / 'x.pth'), tmp_path)
    assert 'all 12 parameters and 0 buffers' in log and 'do not match' not in log
    assert same(snapshot(model), state)


@pytest.mark.parametrize('name', ['SpatialMamba', 'MM_SpatialMamba'])
def test_pretrained_of_a_segmentor(name, tmp_path):
    torch.save(published_classifier(), tmp_path / 'x.pth')
    cfg = load_config('mmseg', '_base_/models/upernet_swin.py')
    arch = dict(arch=ARCH) if name == 'SpatialMamba' else dict(dims=8, depths=ARCH['depths'])
    cfg.backbone = dict(type=name, **arch)
    cfg.decode_head.in_channels, cfg.auxiliary_head.in_channels = [8, 16, 32, 64], 32
    model = build('mmseg', {**cfg, 'pretrained': str(tmp_path / 'x.pth')})
    model.init_weights()
    expected = classifier_state()['layers.2.blocks.1.self_attention.Ds']
    assert torch.equal(model.backbone.stages[2][1].mixer.D, expected)


@pytest.mark.parametrize('name', ['SpatialMamba', 'MM_SpatialMamba'])
def test_pretrained_of_a_classifier(name, tmp_path):
    torch.save(published_classifier(), tmp_path / 'x.pth')
    arch = dict(arch=ARCH) if name == 'SpatialMamba' else dict(dims=8, depths=ARCH['depths'])
    backbone = dict(type=name, out_indices=-1, **arch)
    model = build('mmpretrain', {**CLASSIFIER, 'backbone': backbone, 'pretrained': str(tmp_path / 'x.pth')})
    hooks = dict(load_audit=dict(type='LoadAuditHook'))
    runner = Runner(model, str(tmp_path / 'work'), default_hooks=hooks, experiment_name=f'pretrained {name}')
    # What the runner's train does first.
    runner.call_hook('before_run')
    runner._init_model_weights()
    assert torch.equal(model.head.fc.weight, classifier_state()['head.weight'])
    assert torch.equal(model.backbone.norm3.weight, classifier_state()['norm.weight'])


def test_pretrained_and_init_cfg_exclude_each_other():
    assert (
        small(init_cfg=dict(type='Pretrained', checkpoint=None), pretrained='x.pth').init_cfg['checkpoint'] == 'x.pth'
    )
    assert small(pretrained=None).init_cfg is None
    with pytest.raises(ValueError, match="SpatialMamba: set init_cfg or pretrained .now 'x.pth'., not both"):
        small(init_cfg=dict(type='Pretrained', checkpoint='y.pth'), pretrained='x.pth')
