"""The libraries' own scripts, on PhotoDigits, with the demo's configs, from a directory that is not the project's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.utils import get_installed_path
from torch.distributed.elastic.utils.distributed import get_free_port

from mmspatialmamba.datasets.photo_digits import make_photo_digits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {
    'mmpretrain': ('spatialmamba-pico_photo-digits.py', 'accuracy/top1', ['train_cfg.max_epochs=1']),
    'mmdet': ('mask-rcnn_spatialmamba-pico_fpn_photo-digits.py', 'coco/segm_mAP', ['train_cfg.max_epochs=1']),
    'mmseg': (
        'spatialmamba-pico_upernet_photo-digits.py',
        'mIoU',
        ['train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'default_hooks.checkpoint.interval=4'],
    ),
}
SMALL_BATCHES = ['train_dataloader.batch_size=4', 'default_hooks.logger.interval=1']


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A directory with a small PhotoDigits where the demo's configs look for it."""
    folder = tmp_path_factory.mktemp('workspace')
    make_photo_digits(
        folder / 'data' / 'photo_digits', 64, 16, num_val=4, cls_size=48, num_cls_train=40, num_cls_val=20
    )
    return folder


def run(cwd, *command):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PORT': str(get_free_port()), 'PYTHON': sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def stock_script(library, name):
    return Path(get_installed_path(library), '.mim', 'tools', name)


def config_of(library):
    return ROOT / 'configs' / 'demo' / LIBRARIES[library][0]


def train(workspace, script, library, work_dir, *args, options=()):
    """Train one epoch, or four iterations, and return the checkpoint."""
    options = ['--cfg-options', *SMALL_BATCHES, *LIBRARIES[library][2], *options]
    output = run(workspace, sys.executable, script, config_of(library), '--work-dir', work_dir, *args, *options)
    return Path((work_dir / 'last_checkpoint').read_text()), output


def read_metrics(work_dir):
    return json.loads(max(work_dir.glob('*/*.json')).read_text())


def losses(work_dir):
    lines = [line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.open()]
    return [record['loss'] for record in map(json.loads, lines) if 'loss' in record]


@pytest.fixture(scope='module', params=LIBRARIES)
def trained(request, workspace):
    """A library, and the checkpoint its own train script made."""
    work_dir = workspace / request.param
    checkpoint, output = train(workspace, stock_script(request.param, 'train.py'), request.param, work_dir)
    return request.param, checkpoint, output


def test_stock_train_says_that_it_starts_from_scratch(trained):
    library, checkpoint, output = trained
    assert 'training starts from scratch' in output
    assert all(torch.tensor(losses(checkpoint.parent)).isfinite())


def test_stock_test_reports_the_metric_and_paints(trained, workspace, tmp_path):
    library, checkpoint, _ = trained
    run(
        workspace, sys.executable, stock_script(library, 'test.py'), config_of(library), checkpoint,
        '--work-dir', tmp_path, '--show-dir', tmp_path / 'painted',
        '--cfg-options', 'default_hooks.visualization.interval=1',
    )  # fmt: skip
    assert LIBRARIES[library][1] in read_metrics(tmp_path)
    assert [*tmp_path.rglob('*.png'), *tmp_path.rglob('*.jpg')]


def test_prepared_copies_reach_the_same_metrics(trained, workspace, tmp_path):
    library, checkpoint, _ = trained
    command = [sys.executable, ROOT / 'tools' / 'test.py', config_of(library), checkpoint, '--work-dir']
    run(workspace, *command, tmp_path / 'model')
    output = run(workspace, *command, tmp_path / 'prepared', '--prepare')
    assert 'testing with a copy of the model prepared for CPU inference' in output
    metrics = read_metrics(tmp_path / 'prepared')
    for name, value in read_metrics(tmp_path / 'model').items():
        if 'time' not in name:
            assert metrics[name] == pytest.approx(value, rel=1e-2, abs=1e-2), name


def test_tta_reports_the_metric(trained, workspace, tmp_path):
    library, checkpoint, _ = trained
    script = ROOT / 'tools' / 'test.py'
    run(workspace, sys.executable, script, config_of(library), checkpoint, '--work-dir', tmp_path, '--tta')
    metrics = {LIBRARIES[library][1], 'coco/bbox_mAP'} if library == 'mmdet' else {LIBRARIES[library][1]}
    assert metrics <= set(read_metrics(tmp_path))


def test_resume_goes_on_from_the_last_checkpoint(trained, workspace):
    library, checkpoint, _ = trained
    more = ['train_cfg.max_iters=6', 'train_cfg.val_interval=6', 'default_hooks.checkpoint.interval=6']
    more = more if library == 'mmseg' else ['train_cfg.max_epochs=2']
    resumed, output = train(
        workspace, ROOT / 'tools' / 'train.py', library, checkpoint.parent, '--resume', options=more
    )
    assert resumed.name in ('epoch_2.pth', 'iter_6.pth')
    assert f'resumed epoch: {0 if library == "mmseg" else 1}, iter: ' in output


def test_amp_trains_in_bfloat16(trained, workspace, tmp_path):
    library, _, _ = trained
    _, output = train(workspace, ROOT / 'tools' / 'train.py', library, tmp_path, '--amp')
    assert 'bfloat16 autocast' in output
    assert losses(tmp_path) and all(torch.tensor(losses(tmp_path)).isfinite())


@pytest.fixture(scope='module')
def pretrained(workspace):
    """A classifier's checkpoint."""
    checkpoint, _ = train(workspace, ROOT / 'tools' / 'train.py', 'mmpretrain', workspace / 'classifier')
    return checkpoint


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_two_processes_train_from_classifier_weights_and_test(workspace, pretrained, tmp_path, library):
    options = [*SMALL_BATCHES, *LIBRARIES[library][2], f'pretrained={pretrained}']
    work_dir = tmp_path / library
    output = run(
        workspace, 'bash', ROOT / 'tools' / 'dist_train.sh', config_of(library), 2,
        '--work-dir', work_dir, '--cfg-options', *options,
    )  # fmt: skip
    assert 'training starts from scratch' not in output
    assert f'that {pretrained} should hold were loaded; fresh: 4 output norms' in output
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    run(
        workspace, 'bash', ROOT / 'tools' / 'dist_test.sh', config_of(library), checkpoint, 2,
        '--work-dir', tmp_path / 'test', *(['--tta'] if library == 'mmseg' else ['--prepare']),
    )  # fmt: skip
    assert LIBRARIES[library][1] in read_metrics(tmp_path / 'test')
