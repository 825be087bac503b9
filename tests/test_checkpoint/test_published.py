"""Checkpoints of the published sizes and forms, through every way in, give the original release's outputs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import publish_model
import pytest
import torch
import upstream_to_mmspatialmamba as converter
import weights
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from test_checkpoint.files import ARCH, backbone_state, published_classifier, same

from mmspatialmamba.checkpoint import register_checkpoint_loaders
from mmspatialmamba.datasets.photo_digits import make_photo_digits
from mmspatialmamba.models import MM_SpatialMamba, SpatialMamba

ROOT = Path(__file__).parents[2]
CONFIGS = {
    'mmpretrain': 'classification/spatialmamba-tiny_8xb128_in1k.py',
    'mmdet': 'detection/mask-rcnn_spatialmamba-tiny_fpn_1x_coco.py',
    'mmseg': 'segmentation/spatialmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py',
}
APIS = {'mmpretrain': 'get_model', 'mmdet': 'init_detector', 'mmseg': 'init_model'}


def load_config(library):
    cfg = Config.fromfile(str(ROOT / 'configs' / CONFIGS[library]))
    init_default_scope(library)
    return cfg


def build(library):
    cfg = load_config(library)
    if library == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    return importlib.import_module(f'{library}.registry').MODELS.build(cfg.model)


@pytest.fixture(scope='module')
def classifier_file(keys, tmp_path_factory):
    path = tmp_path_factory.mktemp('cls') / 'tiny.pth'
    model = weights.state_dict(keys['tiny_classifier'])
    average = {name: value + 1 for name, value in model.items()}
    torch.save(
        {'model': model, 'model_ema': average, 'optimizer': {'state': {}, 'param_groups': []}, 'epoch': 299}, path
    )
    return str(path)


@pytest.fixture(scope='module')
def dense_files(keys, tmp_path_factory):
    """Whole detector's and segmentor's files: the library's own head names, the original release's in the backbone."""
    files = {}
    for library in ('mmdet', 'mmseg'):
        with torch.device('meta'):
            model = build(library)
        heads = [(n, tuple(v.shape)) for n, v in model.state_dict().items() if not n.startswith('backbone.')]
        backbone = {f'backbone.{name}': value for name, value in weights.state_dict(keys['tiny_backbone']).items()}
        path = tmp_path_factory.mktemp(library) / 'tiny.pth'
        state = {**backbone, **weights.state_dict(heads)}
        torch.save({'meta': {'epoch': 12, 'dataset_meta': {'classes': ('a', 'b')}}, 'state_dict': state}, path)
        files[library] = str(path)
    return files


def check_logits(model, goldens):
    with torch.no_grad():
        logits = model.eval().head(model.extract_feat(weights.image((2, 3, 224, 224), 41)))
    truth = goldens['model/tiny/logits']
    assert (logits - truth).norm() < 1e-4 * truth.norm()


def check_features(backbone, goldens):
    with torch.no_grad():
        outputs = backbone.eval()(weights.image((1, 3, 150, 203), 42))
    for i, out in enumerate(outputs):
        truth = goldens[f'model/tiny/feat{i}/every7']
        assert (out.flatten()[::7] - truth).norm() < 1e-4 * truth.norm()


def load_by_runner(library, path, work_dir):
    """What the libraries' test scripts do before they run the data."""
    cfg = load_config(library)
    model = cfg.model
    if library == 'mmpretrain':
        model.data_preprocessor = cfg.data_preprocessor
    hooks = dict(load_audit=dict(type='LoadAuditHook'))
    runner = Runner(model, str(work_dir), default_hooks=hooks, load_from=path, default_scope=library)
    runner.call_hook('before_run')
    runner.load_or_resume()
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'parameters and' in log and 'do not match' not in log
    return runner.model


def load_by_api(library, path, work_dir):
    """What the libraries' inference functions do."""
    module = importlib.import_module(f'{library}.apis')
    if library == 'mmpretrain':
        register_checkpoint_loaders()
        return module.get_model(load_config(library), pretrained=path, device='cpu')
    return getattr(module, APIS[library])(load_config(library), path, device='cpu')


@pytest.mark.slow
@pytest.mark.parametrize('load', [load_by_runner, load_by_api], ids=['runner', 'api'])
def test_classifier(classifier_file, goldens, tmp_path, load):
    check_logits(load('mmpretrain', classifier_file, tmp_path), goldens)


@pytest.mark.slow
@pytest.mark.parametrize('load', [load_by_runner, load_by_api], ids=['runner', 'api'])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_detector_and_segmentor(dense_files, goldens, tmp_path, library, load):
    model = load(library, dense_files[library], tmp_path)
    check_features(model.backbone, goldens)
    saved = torch.load(dense_files[library])['state_dict']
    heads = {name: value for name, value in model.state_dict().items() if not name.startswith('backbone.')}
    assert heads and all(torch.equal(value, saved[name]) for name, value in heads.items())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SpatialMamba', 'MM_SpatialMamba', 'load_checkpoint'])
def test_backbone_from_a_detectors_file(dense_files, goldens, name):
    path = dense_files['mmdet']
    if name == 'SpatialMamba':
        backbone = SpatialMamba('tiny', init_cfg=dict(type='Pretrained', checkpoint=path))
    elif name == 'MM_SpatialMamba':
        backbone = MM_SpatialMamba(pretrained=path)
    else:
        backbone = SpatialMamba('tiny')
        load_checkpoint(backbone, path)
    if name != 'load_checkpoint':
        backbone.init_weights()
    check_features(backbone, goldens)


def test_numbers_of_the_readme(classifier_file, capfd):
    MMLogger.get_instance('test_numbers_of_the_readme')
    SpatialMamba('tiny', init_cfg=dict(type='Pretrained', checkpoint=classifier_file)).init_weights()
    line = f'all 525 parameters and 24 buffers that {classifier_file} should hold were loaded; fresh: 4 output norms'
    assert capfd.readouterr().out.count(line) == 1


DEMOS = {
    'mmpretrain': 'spatialmamba-pico_photo-digits.py',
    'mmdet': 'mask-rcnn_spatialmamba-pico_fpn_photo-digits.py',
    'mmseg': 'spatialmamba-pico_upernet_photo-digits.py',
}


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp('workspace')
    make_photo_digits(folder / 'data' / 'photo_digits', 64, 4, num_val=2, cls_size=48, num_cls_train=10, num_cls_val=10)
    return folder


def run_test_script(library, path, cwd):
    command = [sys.executable, ROOT / 'tools' / 'test.py', ROOT / 'configs' / 'demo' / DEMOS[library], path]
    command += ['--work-dir', cwd / library, '--cfg-options', 'default_hooks.load_audit.type=LoadAuditHook']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize('library', DEMOS)
def test_the_test_scripts(workspace, library):
    cfg = Config.fromfile(str(ROOT / 'configs' / 'demo' / DEMOS[library]))
    init_default_scope(library)
    arch, path = dict(cfg.model.backbone.arch), str(workspace / f'{library}.pth')
    if library == 'mmpretrain':
        arch['depths'] = tuple(arch['depths'])
        torch.save(published_classifier(arch=arch), path)
    else:
        model = importlib.import_module(f'{library}.registry').MODELS.build(cfg.model)
        heads = {name: value for name, value in model.state_dict().items() if not name.startswith('backbone.')}
        torch.save({'state_dict': {**backbone_state(arch), **heads}}, path)
    result = run_test_script(library, path, workspace)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f'that {path} should hold were loaded\n' in result.stdout + result.stderr
    assert 'do not match' not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('library', DEMOS)
def test_a_training_is_published(workspace, library, tmp_path, monkeypatch):
    """Every way in takes what publish_model.py makes of a training's checkpoint."""
    monkeypatch.chdir(workspace)
    cfg = Config.fromfile(str(ROOT / 'configs' / 'demo' / DEMOS[library]))
    by_epoch = 'max_epochs' in cfg.train_cfg
    cfg.train_cfg.update(max_epochs=1) if by_epoch else cfg.train_cfg.update(max_iters=1, val_interval=1)
    cfg.default_hooks.checkpoint = dict(type='ResumableCheckpointHook', interval=1, by_epoch=by_epoch)
    cfg.work_dir = str(tmp_path)
    Runner.from_cfg(cfg).train()
    trained = torch.load((tmp_path / 'last_checkpoint').read_text(), weights_only=True)
    published = publish_model.publish((tmp_path / 'last_checkpoint').read_text())
    path = str(converter.write(published, tmp_path / 'model.pth', digest_in_name=True)[1])

    register_checkpoint_loaders()
    load = getattr(importlib.import_module(f'{library}.apis'), APIS[library])
    model = load(cfg, pretrained=path) if library == 'mmpretrain' else load(cfg, path, device='cpu')
    assert same(model.state_dict(), trained['state_dict'])
    classes = trained['meta']['dataset_meta']['classes']
    assert (model._dataset_meta if library == 'mmpretrain' else model.dataset_meta)['classes'] == classes
    result = run_test_script(library, path, workspace)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f'that {path} should hold were loaded\n' in result.stdout + result.stderr


@pytest.mark.slow
def test_the_test_script_refuses_another_arch(workspace):
    path = str(workspace / 'x.pth')
    torch.save(published_classifier(), path)
    result = run_test_script('mmpretrain', path, workspace)
    assert result.returncode != 0
    assert f'{path} does not fit the model' in result.stderr.splitlines()[-1]
    assert ARCH['depths'] == (1, 1, 2, 1) and 'depths=(1, 1, 2, 1)' in result.stderr.splitlines()[-1]
