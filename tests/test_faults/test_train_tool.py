from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import TOOLS, cpu_environment, run_script, write_images
from torch.distributed.elastic.utils.distributed import get_free_port

from mmspatialmamba.engine.checkpoint_hook import is_intact

PACE = """
import os
import time

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class PaceHook(Hook):
    def after_train_epoch(self, runner):
        time.sleep(float(os.environ['SECONDS_OF_AN_EPOCH']))
"""
CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmspatialmamba', 'pace'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(type='SpatialMamba', arch=dict(embed_dims=8, depths=[1, 1]), out_indices=(1,), drop_path_rate=0.5),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16, topk=(1,)),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)),
)
dataset = dict(
    type='CustomDataset',
    data_root='images',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')],
)
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    pin_memory=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dataset,
)
train_cfg = dict(by_epoch=True, max_epochs=16)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20)
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook', interval=1, max_keep_ckpts=2))
custom_hooks = [dict(type='EMAHook', momentum=0.1), dict(type='PaceHook')]
randomness = dict(seed=0)
del dataset
"""
AS_ON_WINDOWS = """
import os
import signal
import sys

opened = os.open


def refuse_folders(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', path)
    return opened(path, *args, **kwargs)


os.open = refuse_folders
del signal.SIGALRM, signal.alarm, os.fork
sys.modules['fcntl'] = None

from mmspatialmamba.engine.launch import main

sys.exit(main('train'))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a config and its images."""
    folder = tmp_path_factory.mktemp('classifier')
    write_images(folder / 'images', [0, 1] * 8)
    (folder / 'config.py').write_text(CONFIG)
    (folder / 'pace.py').write_text(PACE)
    return folder


def start(folder: Path, processes: int, *args: object, seconds: float = 0) -> subprocess.Popen:
    """Start a training in a process group of its own, as a shell does.

    An epoch takes ``seconds`` longer than it needs: one that is to be stopped must not end before that.
    """
    command = [sys.executable, TOOLS / 'train.py', 'config.py']
    if processes > 1:
        command = [TOOLS / 'dist_train.sh', 'config.py', processes]
    return subprocess.Popen(
        list(map(str, [*command, *args])),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=cpu_environment(PORT=get_free_port(), PYTHONPATH=folder, SECONDS_OF_AN_EPOCH=seconds),
    )


def wait_for_checkpoint(process: subprocess.Popen, work_dir: Path) -> None:
    """Wait until this process has saved a checkpoint, and a random moment longer."""
    last = work_dir / 'last_checkpoint'
    old = last.stat().st_mtime_ns if last.is_file() else None
    while not last.is_file() or last.stat().st_mtime_ns == old:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1))


def finish(process: subprocess.Popen) -> tuple[int, str]:
    error = process.communicate(timeout=600)[1]
    return process.returncode, error


def assert_same_end(work_dir: Path, undisturbed: Path) -> None:
    a, b = (torch.load(path / 'epoch_16.pth', weights_only=True) for path in (work_dir, undisturbed))
    for key in ('state_dict', 'ema_state_dict'):
        assert a[key].keys() == b[key].keys()
        assert [name for name in a[key] if not torch.equal(a[key][name], b[key][name])] == []
    assert len(a['random_states']) == len(b['random_states'])


def processes_of_rank(launcher: int, rank: int) -> int:
    """Find the process of a rank among the children of torchrun."""
    for path in Path('/proc').glob('[0-9]*'):
        try:
            parent = int((path / 'stat').read_text().rsplit(')', 1)[1].split()[1])
            environment = (path / 'environ').read_text().split('\0')
        except (OSError, UnicodeDecodeError):
            continue
        if parent == launcher and f'RANK={rank}' in environment:
            return int(path.name)
    raise AssertionError(f'torchrun {launcher} has no process of rank {rank}')


@pytest.mark.slow
def test_stopped_in_every_way_and_resumed(folder):
    undisturbed = start(folder, 1, '--work-dir', 'undisturbed')
    work_dir = folder / 'stopped'
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        resume = ['--resume'] if work_dir.exists() else []
        process = start(folder, 1, '--work-dir', 'stopped', *resume, seconds=1)
        wait_for_checkpoint(process, work_dir)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        status, error = finish(process)
        if signum == signal.SIGKILL:
            assert status == -signum
            continue
        assert status == 128 + signum, error
        (line,) = (line for line in error.splitlines() if line.startswith('train.py:'))
        last = (work_dir / 'last_checkpoint').read_text()
        assert line.startswith(f'train.py: stopped by {signum.name}; to continue from {last}, run the same command')
        assert '--resume' in line
    status, error = finish(start(folder, 1, '--work-dir', 'stopped', '--resume'))
    assert status == 0, error
    status, error = finish(undisturbed)
    assert status == 0, error
    assert_same_end(work_dir, folder / 'undisturbed')


@pytest.mark.slow
def test_trains_without_what_windows_lacks(folder):
    options = ('train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=1')
    command = (sys.executable, '-c', AS_ON_WINDOWS, 'config.py', '--work-dir', 'windows', '--cfg-options', *options)
    result = run_script(*command, cwd=folder, SECONDS_OF_AN_EPOCH=0)
    assert result.returncode == 0, result.stderr
    assert is_intact(folder / 'windows' / 'epoch_1.pth')


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_resume(folder):
    work_dir = folder / 'killed process'
    rank = random.randrange(2)
    options = ('--cfg-options', 'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False')
    process = start(folder, 2, '--work-dir', work_dir, *options, seconds=1)
    wait_for_checkpoint(process, work_dir)
    killed = processes_of_rank(process.pid, rank)
    os.kill(killed, signal.SIGKILL)
    begin = time.monotonic()
    status, error = finish(process)
    seconds = time.monotonic() - begin
    print(f'rank {rank} killed: the other ended after {seconds:.1f} s')
    assert seconds < 60
    assert status != 0
    assert f'Signal 9 (SIGKILL) received by PID {killed}' in error
    for name, args in (('killed process', ['--resume']), ('two processes', [])):
        status, error = finish(start(folder, 2, '--work-dir', name, *args, *options))
        assert status == 0, error
    assert_same_end(work_dir, folder / 'two processes')
