from __future__ import annotations

import json
import os
import stat
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.fileio import load
from mmengine.hooks import LoggerHook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import Registry
from small_runs import TOOLS, check_stderr, dist_train, run_script, write_images
from torch.distributed.elastic.utils.distributed import get_free_port

from mmspatialmamba.engine import ResumableFSDPStrategy, launch

CLASSIFIER = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(
        type='SpatialMamba',
        arch=dict(embed_dims=16, depths=[1, 1, 1, 1]),
        out_indices=(3,),
        drop_path_rate=0.0,
        norm_cfg=dict(type='SyncBN'),
        norm_eval=True,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=128, topk=(1,)),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    pin_memory=False,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root={root!r},
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
test_dataloader = train_dataloader
test_evaluator = dict(type='Accuracy', topk=(1,))
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
randomness = dict(seed=0, diff_rank_seed=False)
"""


@pytest.fixture
def cpu_process(monkeypatch):
    """Make this process look like one on a machine without a GPU, outside of torchrun."""
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('RANK', raising=False)


@pytest.fixture
def run_tool(monkeypatch, capsys, cpu_process):
    def run(task: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', [f'{task}.py', *map(str, args)])
        try:
            status = launch.main(task)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def write(tmp_path):
    def write_config(text: str, name: str = 'config.py') -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_config


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, _, error = result
    assert status == 2
    assert error.count('\n') == 1 and error.endswith('\n'), error
    for word in words:
        assert word in error


@pytest.mark.parametrize('args', [(), ('--work-dir', 'w', 'config.py'), ('--local-rank=0',)])
@pytest.mark.parametrize('task', ['train', 'test'])
def test_config_must_come_first(run_tool, task, args):
    assert_one_line(run_tool(task, *args), 'first argument', f'tools/{task}.py CONFIG')


def test_prepare_is_for_tests(run_tool, write):
    assert_one_line(run_tool('train', write('a = 1'), '--prepare'), '--prepare is for tools/test.py')


@pytest.mark.parametrize('path', ['missing.py', '.'])
def test_missing_config(run_tool, path):
    assert_one_line(run_tool('train', path), f'no config file {path}', str(Path.cwd()))


@pytest.mark.parametrize(
    ('name', 'text', 'reason'),
    [
        ('config.py', 'model = dict(', "SyntaxError: '(' was never closed"),
        ('config.py', 'model = undefined', "NameError: name 'undefined' is not defined"),
        ('config.py', "_base_ = './none.py'", 'none.py'),
        ('config.py', "_base_ = 'mmrotate::base/none.py'", 'mmrotate is not installed'),
        ('config.py', "custom_imports = dict(imports=['nothing_here'])", "'nothing_here'"),
        ('config.json', '{"model": ', 'JSONDecodeError'),
        ('config.yaml', 'model: [', 'ParserError'),
        ('config.txt', 'model = 1', '.txt'),
    ],
    ids=['syntax', 'name', 'base', 'library', 'import', 'json', 'yaml', 'suffix'],
)
def test_config_that_does_not_parse(run_tool, write, name, text, reason):
    path = write(text, name)
    assert_one_line(run_tool('train', path), f'cannot read config {path}:', reason)


@pytest.mark.parametrize('line', ['from nothing_here import Model', 'from mmengine.model import Nothing as Model'])
def test_class_that_cannot_be_imported(run_tool, write, line):
    path = write(f'{line}\nmodel = dict(type=Model)')
    assert_one_line(run_tool('train', path), f'cannot read config {path}:', 'line 1', line.split()[1])


def test_config_without_default_scope(run_tool, write):
    path = write('model = dict()')
    assert_one_line(run_tool('test', path, 'x.pth'), str(path), 'default_scope', 'mmpretrain')


@pytest.mark.parametrize('scope', ['mmpose', 'mmspatialmamba'])
def test_config_of_an_unsupported_library(run_tool, write, scope):
    path = write(f'default_scope = {scope!r}')
    assert_one_line(run_tool('train', path), str(path), scope, 'mmdet, mmseg, mmpretrain')


@pytest.mark.parametrize(
    ('text', 'scope'),
    [
        ("model = dict(type='mmdet.MaskRCNN')", 'mmdet'),
        ("model = dict(type='mmseg.models.segmentors.EncoderDecoder')", 'mmseg'),
        ('from mmpretrain.models import ImageClassifier\nmodel = dict(type=ImageClassifier)', 'mmpretrain'),
        ('from own_models import Own\nmodel = dict(type=Own)', 'mmpretrain'),
        ("default_scope = 'mmseg'\nmodel = dict(type='mmdet.MaskRCNN')", 'mmseg'),
        ("model = dict(type='MaskRCNN')", None),
        ("model = dict(type='mmrazor.Distiller')", None),
    ],
    ids=['scope', 'dumped class', 'class', 'subclass', 'default_scope', 'no scope', 'other library'],
)
def test_library_of_a_config_without_default_scope_is_its_models(write, monkeypatch, text, scope):
    own = write(
        'from mmpretrain.models import ImageClassifier\nclass Own(ImageClassifier):\n    pass\n', 'own_models.py'
    )
    monkeypatch.syspath_prepend(own.parent)
    assert launch.find_scope(Config.fromfile(write(f'default_scope = None\n{text}'))) == scope


@pytest.mark.parametrize(('scope', 'pip_name'), launch.PIP_NAMES.items())
def test_library_that_is_not_installed(run_tool, write, monkeypatch, scope, pip_name):
    monkeypatch.setitem(sys.modules, scope, None)
    path = write(f'default_scope = {scope!r}')
    result = run_tool('train', path)
    assert_one_line(result, f'{scope}, which is not installed', f'pip install {pip_name}')


def test_library_without_its_scripts(run_tool, write, monkeypatch, tmp_path):
    package = tmp_path / 'bare' / 'mmseg' / '__init__.py'
    package.parent.mkdir(parents=True)
    package.touch()
    monkeypatch.delitem(sys.modules, 'mmseg', raising=False)
    monkeypatch.syspath_prepend(package.parents[1])
    result = run_tool('train', write("default_scope = 'mmseg'"))
    assert_one_line(result, str(package.parent / '.mim' / 'tools' / 'train.py'), '--force-reinstall')


@pytest.mark.parametrize('args', [('none.pth',), ('--tta', 'none.pth')])
def test_missing_checkpoint(run_tool, write, args):
    result = run_tool('test', write("default_scope = 'mmpretrain'"), *args)
    assert_one_line(result, 'no checkpoint none.pth', str(Path.cwd()))


@pytest.mark.parametrize('pretrained', [None, 'x.pth'])
@pytest.mark.parametrize(('scope', 'kind'), [('mmdet', 'MaskRCNN'), (None, 'mmdet.models.MaskRCNN')])
def test_mmdet_takes_no_pretrained(run_tool, write, scope, kind, pretrained):
    path = write(f'default_scope = {scope!r}\nmodel = dict(type={kind!r}, pretrained={pretrained!r})')
    assert_one_line(run_tool('train', path), str(path), 'model.pretrained', 'set model.backbone.init_cfg=dict(')


def test_missing_checkpoint_to_resume(run_tool, write):
    result = run_tool('train', write("default_scope = 'mmpretrain'"), '--resume', 'none.pth')
    assert_one_line(result, 'no checkpoint none.pth')


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launchers_that_need_a_gpu(run_tool, write, launcher):
    result = run_tool('train', write("default_scope = 'mmpretrain'"), '--launcher', launcher)
    assert_one_line(result, f'--launcher {launcher} needs a GPU', 'tools/dist_train.sh')


def test_pytorch_launcher_without_torchrun(run_tool, write, tmp_path):
    checkpoint = tmp_path / 'x.pth'
    checkpoint.touch()
    config = write("default_scope = 'mmpretrain'")
    result = run_tool('test', config, checkpoint, '--launcher', 'pytorch')
    assert_one_line(result, 'torchrun', 'tools/dist_test.sh')


@pytest.mark.parametrize('task', ['train', 'test'])
def test_help_without_a_config(run_tool, task):
    status, out, error = run_tool(task, '--help')
    assert (status, error) == (0, '')
    assert out.startswith(f'usage: python tools/{task}.py CONFIG')
    assert '--help' in out and '--prepare' in out


@pytest.mark.parametrize(
    ('scope', 'words'),
    [
        ('mmdet', 'Train a detector'),
        ('mmseg', 'Train a segmentor'),
        ('mmpretrain', '--no-pin-memory'),
    ],
)
def test_help_with_a_config_is_the_librarys(run_tool, write, scope, words):
    status, out, _ = run_tool('train', write(f'default_scope = {scope!r}'), '--help')
    assert status == 0
    assert words in out


@pytest.fixture
def script(write, monkeypatch):
    """A library's script that prints its arguments."""
    path = write(
        'import argparse, json, sys\n'
        'from mmengine.config import DictAction\n'
        'def parse_args():\n'
        '    parser = argparse.ArgumentParser()\n'
        "    parser.add_argument('config')\n"
        "    parser.add_argument('--launcher', default='none')\n"
        "    parser.add_argument('--amp', action='store_true')\n"
        "    parser.add_argument('--auto-scale-lr', action='store_true')\n"
        "    parser.add_argument('--cfg-options', nargs='+', action=DictAction)\n"
        '    return parser.parse_known_args()[0]\n'
        "if __name__ == '__main__':\n"
        '    print(json.dumps(sys.argv))\n',
        'script.py',
    )
    monkeypatch.setattr(launch, 'find_script', lambda *args: str(path))
    return path


@pytest.mark.parametrize(
    ('task', 'args', 'option'),
    [
        ('test', ['--prepare'], 'default_hooks.prepare.type=PrepareForCPUHook'),
        ('train', ['--cfg-options', 'pretrained=x.pth'], 'model.backbone.init_cfg.checkpoint=x.pth'),
    ],
    ids=['prepare', 'pretrained'],
)
def test_our_own_options_reach_the_script_as_overrides(run_tool, write, script, task, args, option):
    path = write("model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=None)))")
    status, out, _ = run_tool(task, path, *args)
    assert status == 0
    argv = json.loads(out)
    assert '--prepare' not in argv
    assert argv[-2:] == ['--cfg-options', option]


def test_a_prepared_test_gets_one_more_hook():
    cfg = Config({'default_hooks': {'timer': {'type': 'IterTimerHook'}}})
    args = Namespace(launcher='none', cfg_options=None)
    cfg.merge_from_dict(parse_options(launch.task_options(cfg, args, 'test', prepare=True)))
    assert cfg.default_hooks == {'timer': {'type': 'IterTimerHook'}, 'prepare': {'type': 'PrepareForCPUHook'}}


@pytest.mark.parametrize('gpu', [False, True], ids=['cpu', 'gpu'])
def test_arguments_reach_the_script_unchanged(run_tool, write, script, monkeypatch, gpu):
    args = [str(write('a = 1')), '--cfg-options', 'a=b c', 'd=[1,2]', '--show-dir', "it's here"]
    if gpu:
        args += ['--amp']
    if gpu:
        monkeypatch.setattr(launch, 'get_device', lambda: 'cuda')
        args += ['--launcher', 'pytorch']
    status, out, _ = run_tool('train', *args)
    assert status == 0
    assert json.loads(out) == [str(script), *args]
    assert not torch.distributed.is_initialized()


AMP = 'optim_wrapper.type=CPUAmpOptimWrapper'
BFLOAT16 = 'optim_wrapper.dtype=bfloat16'


@pytest.mark.parametrize(
    ('config', 'args', 'options'),
    [
        ('a = 1', ['--amp'], [AMP]),
        ('optim_wrapper = None', ['--amp'], [AMP]),
        ("optim_wrapper = dict(type='AmpOptimWrapper')", [], [AMP]),
        ("optim_wrapper = dict(type='mmengine.AmpOptimWrapper')", [], [AMP]),
        ("optim_wrapper = dict(type='mmengine.optim.AmpOptimWrapper')", [], [AMP]),
        ('from mmengine.optim import AmpOptimWrapper\noptim_wrapper = dict(type=AmpOptimWrapper)', [], [AMP]),
        ("optim_wrapper = dict(type='OptimWrapper')", ['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper'], [AMP]),
        ("optim_wrapper = dict(type='AmpOptimWrapper', dtype='float16')", [], [AMP, BFLOAT16]),
        (
            "optim_wrapper = dict(type='AmpOptimWrapper')",
            ['--cfg-options', 'optim_wrapper.dtype=float16'],
            [AMP, BFLOAT16],
        ),
    ],
    ids=['argument', 'no wrapper', 'config', 'scope', 'dumped class', 'class', 'option', 'float16', 'float16 option'],
)
def test_mixed_precision_on_cpu_is_bfloat16_and_says_so(run_tool, write, script, config, args, options):
    status, out, _ = run_tool('train', write(config), *args)
    assert status == 0
    said, argv = out.splitlines()
    assert said.startswith('No GPU: mixed precision is bfloat16 autocast')
    assert said.endswith(' '.join(options))
    assert '--amp' not in json.loads(argv)
    assert json.loads(argv)[-len(options) - 1 :] == ['--cfg-options', *options]


@pytest.mark.parametrize('cfg', ['', 'auto_scale_lr = None', 'auto_scale_lr = dict(enable=False)'])
def test_scaled_learning_rate_needs_to_know_of_which_batch_size(run_tool, write, script, cfg):
    result = run_tool('train', write(f'a = 1\n{cfg}'), '--auto-scale-lr')
    assert_one_line(result, 'config.py', 'auto_scale_lr=dict(base_batch_size=NUMBER)')


@pytest.mark.parametrize('cfg', ['base_batch_size=16', 'enable=False, base_batch_size=16'])
def test_learning_rate_is_scaled_on_request(run_tool, write, script, cfg):
    path = write(f'auto_scale_lr = dict({cfg})')
    status, out, _ = run_tool('train', path, '--auto-scale-lr')
    assert status == 0
    assert json.loads(out)[-2:] == ['--cfg-options', 'auto_scale_lr.enable=True']
    assert json.loads(run_tool('train', path)[1])[1:] == [str(path)]


def parse_options(options: list[str]) -> dict:
    return {key: DictAction._parse_iterable(value) for key, value in (option.split('=', 1) for option in options)}


DDP = {'model_wrapper_cfg.type': 'MMDistributedDataParallel', 'model_wrapper_cfg.device_ids': None}


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        ({}, {**DDP, 'unused': False, 'broadcast': False}),
        ({'find_unused_parameters': True}, {**DDP, 'unused': True, 'broadcast': False}),
        ({'model_wrapper_cfg': {'find_unused_parameters': True}}, DDP),
        ({'model_wrapper_cfg': {'type': 'MMFullyShardedDataParallel'}}, {}),
        (
            {'model_wrapper_cfg': {'type': DDP['model_wrapper_cfg.type'], 'device_ids': [0]}},
            {},
        ),
        ({'model_wrapper_cfg': {'type': MMDistributedDataParallel}}, {'model_wrapper_cfg.device_ids': None}),
        ({'strategy': {'type': 'ResumableFSDPStrategy'}}, {'strategy.model_wrapper.device_id': 'cpu'}),
        ({'strategy': {'type': 'mmengine.FSDPStrategy'}}, {'strategy.model_wrapper.device_id': 'cpu'}),
        ({'strategy': {'type': ResumableFSDPStrategy}}, {'strategy.model_wrapper.device_id': 'cpu'}),
    ],
    ids=[
        *('plain', 'find_unused_parameters', 'own wrapper', 'other wrapper', 'own device_ids', 'wrapper class'),
        *('FSDP', 'FSDP with scope', 'FSDP class'),
    ],
)
def test_model_wrapper_on_cpu(cfg, expected):
    names = {'unused': 'find_unused_parameters', 'broadcast': 'broadcast_buffers'}
    expected = {f'model_wrapper_cfg.{names[key]}' if key in names else key: value for key, value in expected.items()}
    assert parse_options(launch.cpu_options(Config(cfg))) == expected


def test_sync_bn_as_a_class_becomes_bn_on_cpu():
    norm_cfg = dict(type=torch.nn.SyncBatchNorm, requires_grad=True)
    model = dict(
        backbone=dict(norm_cfg=norm_cfg),
        neck=[dict(type='Neck'), dict(norm_cfg=dict(type='torch.nn.SyncBatchNorm'))],
        head=dict(norm_cfg=dict(type='GN'), strides=(4, 8)),
    )
    cfg = Config(dict(model=model))
    cfg.merge_from_dict(parse_options(launch.bn_options(cfg.model)))
    assert cfg.model.backbone.norm_cfg == dict(type='BN', requires_grad=True)
    assert [neck.get('norm_cfg') for neck in cfg.model.neck] == [None, dict(type='BN')]
    assert cfg.model.head.to_dict() == model['head']


def test_sync_bn_becomes_bn_on_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, 'MODELS', registry := Registry('models'))
    registry.register_module('SyncBN', module=torch.nn.SyncBatchNorm)
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=get_free_port()).items():
        monkeypatch.setenv(name, str(value))
    options = launch.start_cpu_process(Config({'sync_bn': 'torch'}), Namespace(launcher='pytorch'), 'train')
    torch.distributed.destroy_process_group()
    assert registry.get('SyncBN') is torch.nn.BatchNorm2d
    assert parse_options(options)['sync_bn'] is None


@pytest.mark.parametrize(
    ('hooks', 'expected'),
    [
        ({}, ['default_hooks.logger.type=MainProcessLoggerHook']),
        (
            {'logger': {'type': 'LoggerHook', 'interval': 5}},
            ['default_hooks.logger.type=MainProcessLoggerHook'],
        ),
        ({'logger': {'type': 'mmengine.LoggerHook'}}, ['default_hooks.logger.type=MainProcessLoggerHook']),
        ({'logger': {'type': LoggerHook}}, ['default_hooks.logger.type=MainProcessLoggerHook']),
        ({'logger': {'type': 'MyLoggerHook'}}, []),
        ({'logger': None}, []),
    ],
    ids=['default', 'LoggerHook', 'with scope', 'class', 'own hook', 'no hook'],
)
def test_one_process_writes_the_metrics(hooks, expected):
    args = Namespace(launcher='pytorch', cfg_options=None, amp=False)
    assert launch.task_options(Config({'default_hooks': hooks}), args, 'test') == expected
    assert launch.task_options(Config({'default_hooks': hooks}), args, 'train') == []


@pytest.mark.slow
@pytest.mark.parametrize('task', ['train', 'test'])
def test_scripts_fail_in_one_line_from_any_directory(tmp_path, task):
    result = run_script(sys.executable, TOOLS / f'{task}.py', 'missing.py', cwd=tmp_path)
    assert_one_line((result.returncode, result.stdout, result.stderr), 'missing.py', str(tmp_path))


@pytest.mark.parametrize(
    'args',
    [
        ('dist_train.sh', 'config.py'),
        ('dist_train.sh', 'config.py', '0'),
        ('dist_train.sh', 'config.py', '--amp'),
        ('dist_test.sh', 'config.py', 'x.pth'),
        ('dist_test.sh', 'config.py', '2', 'x.pth'),
        ('slurm_train.sh', 'gpu', 'job'),
        ('slurm_test.sh', 'gpu', 'job', 'config.py'),
    ],
    ids=' '.join,
)
def test_usage_of_the_shell_scripts(tmp_path, args):
    result = run_script(TOOLS / args[0], *args[1:], cwd=tmp_path)
    assert_one_line((result.returncode, result.stdout, result.stderr), 'usage:', args[0])


def test_shell_scripts_pass_shellcheck():
    scripts = [*TOOLS.rglob('*.sh'), TOOLS.parent / '.ci' / 'run']
    assert {'dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'} < {path.name for path in scripts}
    shellcheck = Path(sys.executable).with_name('shellcheck')
    result = run_script(shellcheck, *scripts, cwd=TOOLS)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def recorder(tmp_path):
    """A program that prints its arguments one by one and exits with status 3, for the scripts to start."""
    path = tmp_path / 'bin' / 'srun'
    path.parent.mkdir()
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit 3\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ('script', 'args', 'expected'),
    [
        ('dist_train.sh', ('my config.py', '2'), ('train.py', 'my config.py')),
        ('dist_test.sh', ('c.py', 'my x.pth', '2'), ('test.py', 'c.py', 'my x.pth')),
    ],
)
def test_dist_scripts_start_torchrun(tmp_path, recorder, script, args, expected):
    extra = ('--cfg-options', 'a=b c', '--amp')
    env = {'NNODES': 2, 'NODE_RANK': 1, 'PORT': 29511, 'MASTER_ADDR': 'host', 'PYTHON': recorder}
    result = run_script(TOOLS / script, *args, *extra, cwd=tmp_path, **env)
    assert (result.returncode, result.stderr) == (3, '')
    assert result.stdout.splitlines() == [
        *('-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1'),
        *('--master_addr=host', '--master_port=29511', '--nproc_per_node=2'),
        *(f'{TOOLS}/{expected[0]}', *expected[1:], '--launcher', 'pytorch', *extra),
    ]


@pytest.mark.parametrize(
    ('script', 'args', 'expected'),
    [
        ('slurm_train.sh', ('my c.py',), ('train.py', 'my c.py', '--launcher', 'slurm')),
        (
            'slurm_train.sh',
            ('c.py', 'work dir', '--cfg-options', 'a=b c', 'd=*'),
            ('train.py', 'c.py', '--launcher', 'slurm', '--work-dir', 'work dir', '--cfg-options', 'a=b c', 'd=*'),
        ),
        (
            'slurm_train.sh',
            ('c.py', '--amp', '--resume'),
            ('train.py', 'c.py', '--launcher', 'slurm', '--amp', '--resume'),
        ),
        (
            'slurm_test.sh',
            ('my c.py', 'my x.pth', '--tta', '--show-dir', 'my dir'),
            ('test.py', 'my c.py', 'my x.pth', '--launcher', 'slurm', '--tta', '--show-dir', 'my dir'),
        ),
    ],
)
@pytest.mark.parametrize(
    ('env', 'resources'),
    [
        ({}, ('--gres=gpu:8', '--ntasks=8', '--ntasks-per-node=8', '--cpus-per-task=5')),
        (
            {'GPUS': 4, 'GPUS_PER_NODE': 2, 'CPUS_PER_TASK': 3, 'SRUN_ARGS': '--quiet -t 9'},
            ('--gres=gpu:2', '--ntasks=4', '--ntasks-per-node=2', '--cpus-per-task=3'),
        ),
    ],
    ids=['defaults', 'environment'],
)
def test_slurm_scripts_start_srun(tmp_path, recorder, script, args, expected, env, resources):
    path = f'{recorder.parent}{os.pathsep}{os.environ["PATH"]}'
    result = run_script(TOOLS / script, 'gpu', 'job', *args, cwd=tmp_path, PATH=path, **env)
    assert result.stdout.splitlines() == [
        *('-p', 'gpu', '--job-name=job', *resources, '--kill-on-bad-exit=1'),
        *env.get('SRUN_ARGS', '').split(),
        *(sys.executable, '-u', f'{TOOLS}/{expected[0]}', *expected[1:]),
    ]
    assert (result.returncode, result.stderr) == (3, '')


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A config of a small classifier on three images of one class and one of another."""
    folder = tmp_path_factory.mktemp('classifier')
    write_images(folder / 'images', [0, 0, 0, 1])
    config = folder / 'classifier.py'
    config.write_text(CLASSIFIER.replace('{root!r}', repr(str(folder / 'images'))))
    return config


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=True)
    return checkpoint['state_dict']


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.fixture(scope='module')
def one_process(classifier):
    work_dir = classifier.parent / 'one process'
    result = run_script(
        *(sys.executable, TOOLS / 'train.py', classifier, '--work-dir', work_dir),
        cwd=classifier.parent,
    )
    assert result.returncode == 0, result.stderr
    return work_dir


@pytest.mark.slow
@pytest.mark.parametrize(('nodes', 'processes'), [(1, 2), (2, 1)])
def test_averaged_gradients_equal_those_of_the_whole_batch(classifier, one_process, nodes, processes):
    work_dir = classifier.parent / f'{nodes} x {processes}'
    options = ('--cfg-options', 'train_dataloader.batch_size=2')
    out = dist_train(classifier, work_dir, *options, nodes=nodes, processes=processes)
    assert '2 CPU processes over gloo' in out
    assert 'BN for SyncBN' in out
    assert largest_difference(weights(work_dir), weights(one_process)) < 1e-6


@pytest.mark.slow
def test_the_share_of_one_process_gives_other_weights(classifier, one_process):
    work_dir = classifier.parent / 'half'
    result = run_script(
        *(sys.executable, TOOLS / 'train.py', classifier, '--work-dir', work_dir, '--cfg-options'),
        *('train_dataloader.batch_size=2', 'train_dataloader.dataset.indices=[0,2]'),
        cwd=classifier.parent,
    )
    assert result.returncode == 0, result.stderr
    assert largest_difference(weights(work_dir), weights(one_process)) > 1e-2


@pytest.mark.slow
def test_two_processes_test_like_one(classifier, one_process, tmp_path):
    checkpoint = one_process / 'epoch_1.pth'
    predictions = []
    for processes in (1, 2):
        out = tmp_path / f'{processes}.pkl'
        work_dir = tmp_path / f'work dir {processes}'
        if processes == 1:
            command = (sys.executable, TOOLS / 'test.py', classifier, checkpoint)
        else:
            command = (TOOLS / 'dist_test.sh', classifier, checkpoint, processes)
        result = run_script(
            *(*command, '--work-dir', work_dir, '--tta', '--out', out),
            cwd=tmp_path,
            PORT=get_free_port(),
        )
        assert result.returncode == 0, result.stderr
        check_stderr(result.stderr)
        predictions.append(load(out))
        (metrics,) = work_dir.glob('*/*.json')
        assert 'accuracy/top1' in json.loads(metrics.read_text())
    assert [len(p) for p in predictions] == [4, 4]
    for one, two in zip(*predictions):
        assert one['img_path'] == two['img_path']
        torch.testing.assert_close(one['pred_score'], two['pred_score'], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_failing_process_fails_the_job(classifier, tmp_path):
    stages = "9 if __import__('os').environ.get('RANK') == '1' else -1"
    config = tmp_path / 'failing.py'
    config.write_text(classifier.read_text().replace('norm_eval=True', f'frozen_stages={stages}'))
    result = run_script(TOOLS / 'dist_train.sh', config, 2, cwd=tmp_path, PORT=get_free_port())
    assert result.returncode != 0
    assert 'frozen_stages' in result.stderr
    assert not list(tmp_path.rglob('*.pth'))
