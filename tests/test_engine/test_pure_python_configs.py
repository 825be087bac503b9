"""mmengine's pure Python configs: types are classes, imports are lazy, and ``default_scope`` is None."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import MODELS, init_default_scope
from small_runs import TOOLS, check_stderr, dist_train, run_script
from torch.distributed.elastic.utils.distributed import get_free_port

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.datasets.photo_digits import make_photo_digits
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.registry import type_name

CONFIGS = Path(__file__).parents[1] / 'data' / 'pure_python'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The configs, and PhotoDigits under the names that they look for in the working directory."""
    folder = tmp_path_factory.mktemp('pure_python')
    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    make_photo_digits(folder / 'data', 64, num_train=2, num_val=1, num_cls_train=1, num_cls_val=1)
    return folder


def read_metrics(work_dir: Path) -> dict:
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'metric'), [('detector', 'coco/bbox_mAP'), ('segmentor', 'mIoU')])
def test_trains_a_step_and_tests(folder, tmp_path, name, metric):
    config, work_dir = folder / f'{name}.py', tmp_path / name
    out = dist_train(config, work_dir)
    assert 'optim_wrapper.type=CPUAmpOptimWrapper optim_wrapper.dtype=bfloat16' in out
    assert 'model.backbone.norm_cfg.type=BN' in out
    checkpoint = work_dir / 'epoch_1.pth'
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    cfg = Config.fromfile(config)
    init_default_scope(cfg.model.type.__module__.split('.')[0])  # or it would be what a test before this one set
    assert isinstance(model := MODELS.build(cfg.model), cfg.model.type)
    model.load_state_dict(state)
    assert all(value.isfinite().all() for value in state.values())
    # It starts at 1, and a step of AdamW is as large as the learning rate.
    step = (state['backbone.stages.0.0.mixer.D'] - 1).abs()
    assert step.max() == pytest.approx(1e-3, rel=0.1)

    test = (TOOLS / 'dist_test.sh', config, checkpoint, 2, '--work-dir', tmp_path / 'two')
    result = run_script(*test, cwd=folder, PORT=get_free_port())
    assert result.returncode == 0, result.stderr
    check_stderr(result.stderr)
    # The config in the work_dir names the classes, with their modules.
    dumped = work_dir / f'{name}.py'
    assert "type='mmspatialmamba.models.SpatialMamba'" in dumped.read_text()
    test = (sys.executable, TOOLS / 'test.py', dumped, checkpoint, '--work-dir', tmp_path / 'one')
    result = run_script(*test, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert read_metrics(tmp_path / 'one')[metric] == read_metrics(tmp_path / 'two')[metric]


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        (AmpOptimWrapper, 'AmpOptimWrapper'),
        ('AmpOptimWrapper', 'AmpOptimWrapper'),
        ('mmengine.AmpOptimWrapper', 'AmpOptimWrapper'),
        ('mmengine.optim.AmpOptimWrapper', 'AmpOptimWrapper'),
        (None, 'None'),
    ],
)
def test_name_of_a_type(kind, name):
    assert type_name(kind) == name


@pytest.mark.parametrize(
    'kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit, 'mmengine.model.weight_init.PretrainedInit']
)
def test_pretrained_weights_are_audited_whatever_the_form_of_their_type(tmp_path, kind):
    torch.save({'stem.conv1.conv.weight': torch.zeros(4, 3, 3, 3)}, tmp_path / 'other.pth')
    init_cfg = dict(type=kind, checkpoint=str(tmp_path / 'other.pth'))
    backbone = SpatialMamba(dict(embed_dims=8, depths=(1,)), out_indices=0, init_cfg=init_cfg)
    with pytest.raises(CheckpointError, match='holds no weights'):
        backbone.init_weights()
