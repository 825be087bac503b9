"""What is loaded from good files, what is reported, and what the options do."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import sys
from collections import OrderedDict

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from test_checkpoint.files import ARCH, backbone_state, classifier_state, published_classifier, same, small, snapshot
from test_checkpoint.test_refusals import Model, make_runner, run
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError, inflate, read_checkpoint, register_checkpoint_loaders
from mmspatialmamba.models import MM_SpatialMamba
from mmspatialmamba.models.utils import from_upstream, to_upstream

ALL = 'all 174 parameters and 24 buffers that {} should hold were loaded'


def audits(lines):
    return [(level, text) for level, text in lines if 'parameters and' in text]


@pytest.fixture
def published(tmp_path):
    torch.save(published_classifier(), tmp_path / 'cls.pth')
    return str(tmp_path / 'cls.pth')


def ours(state: dict, last=None) -> dict:
    return {from_upstream(name.replace('backbone.', ''), last): value for name, value in state.items()}


def init(path, **kwargs):
    options = {key: kwargs.pop(key) for key in ('max_missing', 'allow_nan', 'inflate_stem', 'prefix') if key in kwargs}
    backbone = small(init_cfg=dict(type='Pretrained', checkpoint=path, **options), **kwargs)
    before = snapshot(backbone)
    backbone.init_weights()
    return backbone, before


def test_dense_backbone_from_a_classifier(published, lines):
    backbone, before = init(published)
    expected = ours(classifier_state())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith('norm') else expected[name])
    assert audits(lines) == [(logging.INFO, ALL.format(published) + '; fresh: 4 output norms')]


def test_classifier_backbone_takes_the_norm(published, lines):
    backbone, _ = init(published, out_indices=-1)
    expected = ours(classifier_state(), last=3)
    assert same(snapshot(backbone), {name: expected[name] for name in backbone.state_dict()})
    assert audits(lines) == [(logging.INFO, ALL.replace('174', '176').format(published))]


def test_backbone_from_a_detector_takes_everything(tmp_path, lines):
    path = str(tmp_path / 'det.pth')
    heads = {'neck.lateral_convs.0.conv.weight': torch.ones(2, 2), 'roi_head.bbox_head.fc_cls.bias': torch.ones(81)}
    torch.save({'meta': {}, 'state_dict': OrderedDict({**backbone_state(), **heads})}, path)
    backbone, _ = init(path)
    assert same(snapshot(backbone), ours(backbone_state()))
    assert audits(lines) == [(logging.INFO, ALL.replace('174', '182').format(path))]


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), -1], ids=['dense', 'classifier'])
def test_our_own_classifiers_checkpoint(tmp_path, out_indices):
    model, path = Model(), str(tmp_path / 'ours.pth')
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, path)
    backbone, before = init(path, out_indices=out_indices)
    for name, value in backbone.state_dict().items():
        fresh = name.startswith('norm') and out_indices != -1
        assert torch.equal(value, before[name] if fresh else model.backbone.state_dict()[name])


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_bare_and_wrapped_state_dicts(tmp_path, prefix):
    path = str(tmp_path / 'x.pth')
    torch.save(backbone_state(prefix=prefix), path)
    backbone, _ = init(path)
    assert same(snapshot(backbone), ours(backbone_state(prefix='')))
    assert set(read_checkpoint(path)['state_dict']) == {f'backbone.{name}' for name in backbone.state_dict()}


def test_one_of_several_backbones_is_chosen_by_prefix(tmp_path):
    path = str(tmp_path / 'x.pth')
    states = {**backbone_state(prefix='student.'), **backbone_state(prefix='teacher.', seed=1)}
    torch.save({'state_dict': states}, path)
    with pytest.raises(CheckpointError, match="set prefix in init_cfg to one of 'student.', 'teacher.'"):
        init(path)
    assert same(snapshot(init(path, prefix='teacher')[0]), ours(backbone_state(prefix='', seed=1)))
    with pytest.raises(CheckpointError, match="no weights of a .* below prefix 'pupil.', but below 'student.'"):
        init(path, prefix='pupil')


def load_by_ema(way, path, tmp_path):
    if way == 'init_cfg':
        return init(path, out_indices=-1)[0]
    if way == 'pretrained':
        backbone = MM_SpatialMamba(dims=8, depths=ARCH['depths'], pretrained=path, out_indices=-1)
        backbone.init_weights()
        return backbone
    model = Model()
    if way == 'load_checkpoint':
        register_checkpoint_loaders()
        load_checkpoint(model, path)
    elif way == 'load_from':
        run(make_runner(model, tmp_path / 'work', load_from=path))
    else:
        make_runner(model, tmp_path / 'work').load_checkpoint(path)
    return model.backbone


@pytest.mark.parametrize('way', ['init_cfg', 'pretrained', 'load_checkpoint', 'load_from', 'by mmengine'])
def test_average_is_chosen_by_name(published, tmp_path, way):
    for path, seed in ((published, 0), (f'ema://{published}', 1)):
        backbone = load_by_ema(way, path, tmp_path)
        expected = ours(classifier_state(seed=seed), last=3)
        assert same(snapshot(backbone), {name: expected[name] for name in backbone.state_dict()})


def test_file_without_an_average(tmp_path):
    path = str(tmp_path / 'x.pth')
    torch.save({'model': classifier_state(), 'model_ema': None}, path)
    with pytest.raises(CheckpointError, match=r'holds no averaged weights \(keys: model, model_ema\)'):
        init(f'ema://{path}')
    torch.save({'state_dict': backbone_state()}, path)
    with pytest.raises(CheckpointError, match=r'holds no averaged weights \(keys: state_dict\)'):
        init(f'ema://{path}')
    torch.save({'state_dict': {'conv.weight': torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match='ema:// is for checkpoints of Spatial-Mamba'):
        init(f'ema://{path}')


def test_mmengines_average_is_its_state_dict(trained):
    path, _, average = trained
    for name in (path, f'ema://{path}'):
        assert same(snapshot(init(name, out_indices=-1)[0]), average.module.backbone.state_dict())


def test_resume_with_an_average_is_audited_and_exact(trained, tmp_path):
    path, source, average = trained
    model = Model()
    runner = make_runner(model, tmp_path / 'work', custom_hooks=[dict(type='EMAHook', update_buffers=True)])
    runner._resume = True
    runner.call_hook('before_run')
    runner.load_checkpoint(path)
    assert same(snapshot(model), snapshot(source))
    resumed = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model
    assert same(snapshot(resumed), snapshot(average))
    checkpoint = torch.load(path)
    del checkpoint['ema_state_dict']['module.head.fc.bias']
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'\(ema_state_dict\) does not fit .* 1 missing .* head.fc.bias'):
        runner.load_checkpoint(str(tmp_path / 'x.pth'))


def rename(checkpoint, name):
    """Give a training checkpoint other names, and so the parameters another order."""
    renamed = {key: OrderedDict() for key in ('state_dict', 'ema_state_dict')}
    for key, state in renamed.items():
        state.update((name(old), value) for old, value in sorted(checkpoint[key].items()))
    return {**checkpoint, **renamed}


NAMES = {
    'earlier version': lambda name: name.replace('.mixer.ln.', '.ln1.').replace('.mlp.ln.', '.ln2.'),
    'original release': lambda name: re.sub(r'backbone\.(.*)', lambda match: 'backbone.' + to_upstream(match[1]), name),
}


@pytest.mark.parametrize('source', NAMES)
def test_other_names_give_weights_but_no_optimizer_state(trained, tmp_path, source):
    path, expected, _ = trained
    average = torch.load(path, weights_only=True)['state_dict']
    checkpoint = rename(torch.load(path, weights_only=True), NAMES[source])
    assert checkpoint['state_dict'].keys() != average.keys() and 'optimizer' in checkpoint
    torch.save(checkpoint, tmp_path / 'x.pth')
    path, model = str(tmp_path / 'x.pth'), Model()
    run(make_runner(model, tmp_path / 'work', load_from=path))
    assert same(snapshot(model), average)
    assert same(snapshot(init(path, out_indices=-1)[0]), {k[9:]: v for k, v in average.items() if k[:9] == 'backbone.'})
    model = Model()
    model.load_state_dict(checkpoint['state_dict'])
    assert same(snapshot(model), average)
    says = r'cannot resume from {}: .* start from its weights, by load_from without resume'
    with pytest.raises(CheckpointError, match=says.format(path)) as caught:
        run(make_runner(Model(), tmp_path / 'work', load_from=path, resume=True))
    assert '\n' not in str(caught.value)
    # Read by mmengine's own loader.
    again = shutil.copy(path, tmp_path / 'y.pth')
    with pytest.raises(CheckpointError, match=says.format('the checkpoint')):
        make_runner(Model(), tmp_path / 'work', resume=True).load_checkpoint(str(again))


@pytest.mark.parametrize(
    'depths, embed_dims, problem, row',
    [
        ((1, 1, 3, 1), 8, '27 not in the model.s backbone .first: stages.2.2.cpe1.weight', 'stages.2.2.* '),
        ((1, 1, 1, 1), 8, '27 missing from the file .first: stages.2.1.cpe1.weight', 'stages.2.1.* '),
        ((1, 1, 2, 1), 4, '185 of another shape .first: stem.conv1.conv.weight', 'stem.conv1.conv.weight'),
    ],
    ids=['deeper', 'shallower', 'narrower'],
)
def test_wrong_arch(tmp_path, lines, depths, embed_dims, problem, row):
    path, arch = str(tmp_path / 'x.pth'), dict(embed_dims=embed_dims, depths=depths)
    torch.save({'model': classifier_state(arch)}, path)
    hint = f"use a complete file of the model's arch, embed_dims=8, depths=.* this one's is embed_dims={embed_dims}, "
    with pytest.raises(CheckpointError, match=f'{problem}.*{hint}'):
        init(path)
    [(level, text)] = audits(lines)
    assert level == logging.WARNING
    assert [line for line in text.splitlines() if row in line]


def test_half_a_file(tmp_path, lines):
    path, state = str(tmp_path / 'half.pth'), classifier_state()
    half = dict(list(state.items())[: len(state) // 2])
    torch.save({'model': half}, path)
    with pytest.raises(CheckpointError, match='94 missing from the file'):
        init(path)
    [(level, text)] = audits(lines)
    assert level == logging.WARNING
    rows = [' '.join(line.strip('│ ').split()) for line in text.splitlines() if line.startswith('│')]
    assert rows == [
        'stages.2.0.* │ missing from the file │ │ 10 tensors',
        *(f'stages.{i}.* │ missing from the file │ │ 27 tensors' for i in ('2.1', '3.0')),
        *(f'downsamples.{i}.* │ missing from the file │ │ 10 tensors' for i in range(3)),
    ]


def test_max_missing(tmp_path, lines):
    path, state = str(tmp_path / 'x.pth'), classifier_state()
    mixer = 'layers.0.blocks.0.self_attention'
    del state[f'{mixer}.in_proj.weight'], state[f'{mixer}.conv2d.bias']
    torch.save({'model': state}, path)
    with pytest.raises(CheckpointError, match="2 missing .*set max_missing in the backbone's init_cfg"):
        init(path, max_missing=1)
    backbone, before = init(path, max_missing=2)
    assert torch.equal(backbone.stages[0][0].mixer.in_proj.weight, before['stages.0.0.mixer.in_proj.weight'])
    assert torch.equal(backbone.stages[0][0].mixer.out_proj.weight, state[f'{mixer}.out_proj.weight'])
    assert [level for level, _ in audits(lines)] == [logging.WARNING, logging.WARNING]


def test_batch_counters_may_be_missing(tmp_path, lines):
    path = str(tmp_path / 'x.pth')
    state = {name: value for name, value in classifier_state().items() if not name.endswith('num_batches_tracked')}
    torch.save({'model': state}, path)
    init(path)
    # In torch 2.1 BatchNorm loads a counter of its own then.
    assert re.match('all 174 parameters and (16|24) buffers', audits(lines)[0][1])


@pytest.mark.parametrize('in_channels', [1, 2, 4, 6])
def test_other_image_channels(published, in_channels):
    with pytest.raises(CheckpointError, match="set inflate_stem=True in the backbone's init_cfg"):
        init(published, in_channels=in_channels)
    backbone, _ = init(published, in_channels=in_channels, inflate_stem=True)
    weight, original = backbone.stem.conv1.conv.weight, classifier_state()['patch_embed.conv1.conv.weight']
    assert torch.equal(weight, inflate(original, in_channels))
    grey = torch.rand(1, 1, 16, 16)
    if in_channels % 3 == 0 or in_channels == 1:
        outputs = [nn.functional.conv2d(grey.expand(-1, w.shape[1], -1, -1), w) for w in (weight, original)]
        torch.testing.assert_close(*outputs)


def test_inflation_repeats_the_kernels_in_turn():
    weight = torch.arange(3.0).reshape(1, 3, 1, 1)
    assert inflate(weight, 4).flatten().tolist() == [0, 0.75, 1.5, 0]
    assert inflate(weight, 1).flatten().tolist() == [3]


def test_nan_may_be_allowed(tmp_path):
    path, state = str(tmp_path / 'x.pth'), classifier_state()
    state['layers.1.blocks.0.self_attention.Ds'][0] = float('nan')
    torch.save({'model': state}, path)
    with pytest.raises(CheckpointError, match=r'stages.1.0.mixer.D holds NaN .*set allow_nan=True in the backbone'):
        init(path)
    assert init(path, allow_nan=True)[0].stages[1][0].mixer.D[0].isnan()


def test_unknown_options_are_errors(published):
    with pytest.raises(TypeError, match="init_cfg of type 'Pretrained' takes .*'max_missing'.*, but has strict"):
        small(init_cfg=dict(type='Pretrained', checkpoint=published, strict=True)).init_weights()


def test_other_initialisers_come_first_and_are_overwritten(published):
    configs = [dict(type='Constant', layer='LayerNorm', val=7.0), dict(type='Pretrained', checkpoint=published)]
    backbone = small(init_cfg=configs)
    backbone.init_weights()
    assert backbone.norm0.weight[0] == 7
    norm, name = backbone.stages[0][0].mixer.out_norm, 'layers.0.blocks.0.self_attention.out_norm.weight'
    assert torch.equal(norm.weight, classifier_state()[name])
    assert backbone.init_cfg == configs


def test_mmengines_bookkeeping(published, tmp_path):
    logger = MMLogger.get_instance(f'book{len(MMLogger._instance_dict)}', log_file=str(tmp_path / 'log.txt'))
    model = Model(init_cfg=dict(type='Pretrained', checkpoint=published))
    model.init_weights()
    for handler in logger.handlers:
        handler.flush()
    text = (tmp_path / 'log.txt').read_text()
    described = text[text.index('backbone.stages.0.0.mixer.in_proj.weight - ') :].split('\n\n')[0]
    assert described.splitlines()[1].strip() == f'PretrainedInit: load from {published}'
    assert not hasattr(model.backbone, '_params_init_info')


class Detector(Model):
    """A dense backbone with another head."""

    def __init__(self):
        super().__init__()
        self.backbone = small()
        del self.head
        self.neck = nn.Linear(3, 3)
        self.bbox_head = nn.Linear(3, 2)


def run_hook(model, path, tmp_path, **options):
    hook = dict(type='LoadAuditHook', **options)
    runner = Runner(
        model,
        str(tmp_path / 'work'),
        default_hooks=dict(load_audit=hook),
        load_from=path,
        experiment_name=f'hook{len(MMLogger._instance_dict)}',
    )
    run(runner)
    log = next((tmp_path / 'work').glob(f'{runner.timestamp}*/*.log')).read_text()
    return log


def test_hook_classifier_from_a_classifier(published, tmp_path):
    model = Model()
    log = run_hook(model, published, tmp_path)
    assert ALL.format(published).replace('174', '178') + '\n' in log
    assert 'do not match' not in log
    assert torch.equal(model.head.fc.weight, classifier_state()['head.weight'])


def test_hook_detector_from_a_classifier(published, tmp_path):
    model = Detector()
    before = snapshot(model)
    log = run_hook(model, published, tmp_path)
    assert ALL.format(published) + '; fresh: 4 output norms, neck, bbox_head\n' in log
    assert 'do not match' not in log
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if not name.startswith('backbone.') or '.norm3' in name]
    assert torch.equal(model.backbone.stages[2][1].mixer.D, classifier_state()['layers.2.blocks.1.self_attention.Ds'])


def test_hook_detector_from_a_detector(tmp_path):
    path, heads = str(tmp_path / 'det.pth'), {n: torch.ones_like(v) for n, v in Detector().state_dict().items()}
    state = {name: value for name, value in heads.items() if not name.startswith('backbone.')}
    torch.save({'state_dict': {**backbone_state(), **state}, 'meta': {}}, path)
    model = Detector()
    log = run_hook(model, path, tmp_path)
    assert 'all 186 parameters and 24 buffers' in log and 'fresh' not in log
    assert same(snapshot(model.backbone), ours(backbone_state()))
    del state['neck.bias']
    torch.save({'state_dict': {**backbone_state(), **state}, 'meta': {}}, path)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r'1 missing from the file \(first: neck.bias\).*max_missing in default_'):
        run_hook(model, path, tmp_path)
    assert same(snapshot(model), before)
    run_hook(model, path, tmp_path, max_missing=1)


def test_hook_other_class_count(tmp_path):
    path, model = str(tmp_path / 'x.pth'), Model()
    torch.save({'model': classifier_state(classes=1000)}, path)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r'2 of another shape \(first: head.fc.weight\)'):
        run_hook(model, path, tmp_path)
    assert same(snapshot(model), before)
    log = run_hook(model, path, tmp_path, fresh=['head.fc'])
    assert ALL.format(path).replace('174', '176') + '; fresh: head.fc\n' in log
    assert torch.equal(model.head.fc.weight, before['head.fc.weight'])
    assert torch.equal(model.backbone.norm3.weight, classifier_state()['norm.weight'])


def test_hook_other_options(tmp_path):
    path, model, state = str(tmp_path / 'x.pth'), Model(in_channels=4), classifier_state()
    state['head.bias'][0] = float('inf')
    torch.save({'model': state}, path)
    with pytest.raises(CheckpointError, match='set inflate_stem=True in default_hooks.load_audit'):
        run_hook(model, path, tmp_path, allow_nan=True)
    with pytest.raises(CheckpointError, match='head.fc.bias holds NaN or infinity.*allow_nan=True in default_hooks'):
        run_hook(model, path, tmp_path, inflate_stem=True)
    run_hook(model, path, tmp_path, allow_nan=True, inflate_stem=True)
    assert model.backbone.stem.conv1.conv.weight.shape[1] == 4 and model.head.fc.bias[0].isinf()


def test_hook_sees_through_test_time_augmentation(published, tmp_path):
    class TTA(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    model = TTA(Model())
    log = run_hook(model, published, tmp_path)
    assert ALL.format(published).replace('174', '178') in log
    assert torch.equal(model.module.head.fc.weight, classifier_state()['head.weight'])


def test_without_the_hook_the_backbone_audits(published, tmp_path, lines):
    register_checkpoint_loaders()
    model = Detector()
    load_checkpoint(model, published, logger='current')
    assert audits(lines) == [(logging.INFO, ALL.format(published) + '; fresh: 4 output norms')]
    assert torch.equal(model.backbone.norm3.weight, Detector().backbone.norm3.weight)
    torch.save({'model': classifier_state(dict(embed_dims=8, depths=(1, 1, 3, 1)))}, tmp_path / 'x.pth')
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="default_hooks=dict.load_audit|27 not in the model's backbone"):
        load_checkpoint(model, str(tmp_path / 'x.pth'))
    assert same(snapshot(model), before)


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_without_the_hook_another_networks_file_is_refused(tmp_path, key):
    state = {'layers.0.blocks.0.attn.qkv.weight': torch.ones(2, 2)}
    torch.save(state if key is None else {key: state, 'epoch': 3}, tmp_path / 'swin.pth')
    register_checkpoint_loaders()
    model = Detector()
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match='swin.pth does not fit.*name another file: none of its tensors is one of'
    ):
        load_checkpoint(model, str(tmp_path / 'swin.pth'))
    assert same(snapshot(model), before)


def test_hook_detector_of_the_last_stage_alone(published, tmp_path):
    model = Model()
    model.bbox_head = nn.Linear(3, 2)
    log = run_hook(model, published, tmp_path)
    assert ALL.format(published).replace('174', '176') + '; fresh: head, bbox_head\n' in log
    assert torch.equal(model.backbone.norm3.weight, classifier_state()['norm.weight'])


def test_with_the_hook_it_is_audited_once(published, tmp_path):
    assert run_hook(Model(), published, tmp_path).count('parameters and') == 1


def test_plain_state_dicts_are_not_audited(lines):
    backbone = small()
    state = backbone.state_dict()
    del state['norm3.bias']
    assert backbone.load_state_dict(state, strict=False).missing_keys == ['norm3.bias']
    with pytest.raises(RuntimeError, match='Missing key') as caught:
        backbone.load_state_dict(state)
    assert not isinstance(caught.value, CheckpointError)
    assert audits(lines) == []


def test_other_models_files_load_as_they_are(tmp_path):
    checkpoint = {'state_dict': nn.Linear(2, 2).state_dict(), 'meta': {'epoch': 3}, 'optimizer': {'lr': 1.0}}
    checkpoint['state_dict']['bias'][0] = float('nan')
    path = str(tmp_path / 'linear.pth')
    torch.save(checkpoint, path)
    register_checkpoint_loaders()
    loaded = CheckpointLoader.load_checkpoint(path)
    assert list(loaded) == list(checkpoint) and loaded['meta'] == checkpoint['meta']
    model = nn.Linear(2, 2)
    load_checkpoint(model, path, strict=True)
    assert model.bias[0].isnan()


def test_settings_of_the_original_release_are_read_as_plain_dicts(tmp_path, monkeypatch):
    config = type('CfgNode', (dict,), {'__module__': 'yacs.config', '__qualname__': 'CfgNode'})
    module = type(sys)('yacs.config')
    module.CfgNode = config
    monkeypatch.setitem(sys.modules, 'yacs', type(sys)('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    settings = config(MODEL=config(DEPTHS=[1, 1]), AUG=config(MIXUP=0.8, CUTMIX=None))
    settings.__dict__['__immutable__'] = True
    path = str(tmp_path / 'x.pth')
    torch.save({**published_classifier(), 'config': settings}, path)
    monkeypatch.delitem(sys.modules, 'yacs.config')
    monkeypatch.delitem(sys.modules, 'yacs')
    init(path)
    assert torch.load(path, weights_only=True)['config'] == {
        'MODEL': {'DEPTHS': [1, 1]},
        'AUG': {'MIXUP': 0.8, 'CUTMIX': None},
    }


def test_a_checkpoint_that_was_read_can_be_saved_again(published, tmp_path):
    checkpoint = read_checkpoint(published)
    torch.save(checkpoint, tmp_path / 'again.pth')
    assert same(read_checkpoint(str(tmp_path / 'again.pth'))['state_dict'], checkpoint['state_dict'])
    pickle.dumps(checkpoint)
