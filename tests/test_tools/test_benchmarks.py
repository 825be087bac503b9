from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmspatialmamba import ops

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools' / 'analysis_tools'
OURS = 'SpatialMamba-T'
BLOCK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split('.')[0] in hidden else find(name, path, target))
"""


@pytest.fixture
def tools(monkeypatch):
    """The benchmarks' modules."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmark_backbone
    import benchmark_ops
    import measuring

    return SimpleNamespace(backbone=benchmark_backbone, ops=benchmark_ops, measuring=measuring)


def run(*command, **variables):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **variables}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def test_functions_are_timed_in_turn(tools):
    calls = []

    def subject(name, seconds):
        def function():
            calls.append(name)
            time.sleep(seconds)

        return function

    times = tools.measuring.measure({'a': subject('a', 0.002), 'b': subject('b', 0.004)}, 0, rounds=(4, 9))
    assert calls[-8:] == ['a', 'b'] * 4
    assert {name: len(values) for name, values in times.items()} == {'a': 4, 'b': 4}
    assert 2 <= np.median(times['a']) < np.median(times['b'])


def test_spread(tools):
    assert tools.measuring.spread(np.array([1.0, 2.0, 3.0, 4.0, 50.0])) == {'median': 3.0, 'q25': 2.0, 'q75': 4.0}


def test_kept_bytes_counts_each_storage_once(tools):
    x, y = (torch.rand(10, 10, requires_grad=True) for _ in range(2))
    kept_bytes = tools.measuring.kept_bytes
    assert kept_bytes(lambda: x * y) == 2 * 400
    assert kept_bytes(lambda: x * x.T) == 400
    assert kept_bytes(lambda: x + y) == 0
    assert kept_bytes(lambda: x * y, [y]) == 400
    assert kept_bytes(lambda: checkpoint(lambda z: (z * y).sin(), x, use_reentrant=False)) == 400


@pytest.mark.parametrize('backend', ops.available_backends())
@pytest.mark.parametrize(
    'op', ['structure_aware_scan', 'selective_scan', 'state_fusion', 'depthwise_conv', 'gated_layer_norm']
)
def test_each_op_is_called_with_gradients_for_all_inputs(tools, op, backend):
    if tools.ops.why_unusable(backend, 'cpu'):
        pytest.skip(f'the {backend} backend needs a GPU')
    call, inputs = tools.ops.make_call(op, 2, 16, 9, torch.float32, 'channels_last', 'cpu')
    out = tools.ops.on_backend(backend, call)
    assert out.shape[0] == 2 and out.numel() == 2 * 16 * 81
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_scan_keeps_its_inputs_alone(tools):
    call, inputs = tools.ops.make_call('structure_aware_scan', 1, 3, 9, torch.float32, 'channels_last', 'cpu')
    assert tools.measuring.kept_bytes(lambda: tools.ops.on_backend('torch', call)) == sum(t.nbytes for t in inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_a_backend_that_cannot_run_is_named(tools, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark_ops.py', '--backends', 'triton'])
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(SystemExit):
        tools.ops.parse_args()
    assert 'error: --backends triton: ' in capsys.readouterr().err


@pytest.mark.parametrize(
    'name, millions', [('Swin-T', 27.5), ('ConvNeXt-T', 27.8), ('ResNet-50', 23.5)], ids=['swin', 'convnext', 'resnet']
)
def test_peers_are_the_published_networks(tools, name, millions):
    model = tools.backbone.build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_layers_alone_are_the_backbone_without_its_norms(tools):
    from mmspatialmamba.models import SpatialMamba

    counts = [
        sum(p.numel() for p in model.parameters())
        for model in (tools.backbone.build_from_layers(), SpatialMamba('tiny'))
    ]
    assert counts[1] - counts[0] == 2 * (64 + 128 + 256 + 512)


def test_a_training_step_changes_the_weights(tools):
    step = tools.backbone.Step('ResNet-50', 'training', 'float32', 'channels_last', '2x32x32', 'cpu')
    before = step.model[0].weight.detach().clone()
    step()
    assert step.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(before, step.model[0].weight)


def test_the_prepared_copy_is_what_runs(tools, monkeypatch):
    class Prepared(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            assert not self.model.training and image.dtype == torch.bfloat16
            return torch.zeros(())

    monkeypatch.setitem(sys.modules, 'mmspatialmamba.deploy', SimpleNamespace(prepare_for_cpu=Prepared))
    monkeypatch.setattr(tools.backbone, 'PEERS', ())
    args = SimpleNamespace(compile=False, prepare=True, no_memory=True, device='cpu', seconds=0)
    rows = tools.backbone.compare(args, 'inference', 'bfloat16', '1x32x32')
    assert [(row['name'], row['form']) for row in rows] == [(OURS, 'eager'), (OURS, 'prepared')]
    assert rows[1]['ratios'][OURS]['median'] < 0.5


def test_calls_of_swin_are_the_known_ones(tools):
    # torchvision 0.16 to 0.29: its four files, and every call in them.
    from torchvision.models import swin_t

    files, calls, everything = tools.backbone.count_calls(swin_t(), 'torchvision')
    assert (files, calls) == (4, 141) and everything > 1000


def test_a_bad_input_size_is_named(tools, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark_backbone.py', '--inference', '224'])
    with pytest.raises(SystemExit):
        tools.backbone.parse_args()
    assert "'224' is no BATCHxHEIGHTxWIDTH, such as 1x512x512" in capsys.readouterr().err


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *get_device_name*) echo Some-GPU; exit ;;
  *"-m pytest"*) echo 1 failed; exit 1 ;;
esac
echo "ran $* FORCE_CUDA=$FORCE_CUDA"
"""


def test_gpu_check_goes_on_after_a_failure_and_fails(tmp_path):
    python = tmp_path / 'python'
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    result = run('bash', TOOLS / 'gpu_check.sh', tmp_path / 'out', PYTHON=str(python))
    assert result.returncode == 1
    log = (tmp_path / 'out' / 'check_Some-GPU.log').read_text()
    assert 'ran setup.py build_ext --inplace FORCE_CUDA=1' in log
    assert 'ran tools/analysis_tools/benchmark_ops.py --device cuda' in log
    assert 'ran tools/analysis_tools/benchmark_backbone.py --device cuda' in log
    assert log.splitlines()[-1].startswith('gpu_check.sh: failed: tests; see ')


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    result = run('bash', TOOLS / 'gpu_check.sh', tmp_path / 'out', PYTHON=sys.executable)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1 and 'no PyTorch that finds a GPU' in result.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_benchmark_ops_with_torch_alone(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(BLOCK)
    path = f'{tmp_path}{os.pathsep}{ROOT}'
    command = (sys.executable, TOOLS / 'benchmark_ops.py', '--quick', '--threads', 1, '--device', 'cpu')
    result = run(*command, '--out', tmp_path, '--dtypes', 'float32', 'bfloat16', PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob('ops_*.json')
    record = json.loads(file.read_text())
    assert record['machine']['threads'] == 1 and set(record['machine']['tf32']) == {'matmul', 'cudnn'}
    assert 'torch' in record['machine']['versions']
    assert {row['op'] for row in record['rows']} == {
        'structure_aware_scan',
        'selective_scan',
        'state_fusion',
        'depthwise_conv',
        'gated_layer_norm',
    }
    assert {row['dtype'] for row in record['rows']} == {'float32', 'bfloat16'}
    for row in record['rows']:
        for part in ('forward', 'both'):
            assert row[part]['to_floor']['q25'] <= row[part]['to_floor']['median'] <= row[part]['to_floor']['q75']
            if row['backend'] == 'torch':
                assert row[part]['torch_to_this']['median'] == 1


@pytest.mark.slow
def test_benchmark_backbone(tmp_path):
    command = (sys.executable, TOOLS / 'benchmark_backbone.py', '--quick', '--threads', 1, '--device', 'cpu')
    command += ('--inference', '1x64x64', '--training', '1x64x64', '--precisions', 'float32', '--no-memory')
    result = run(*command, '--out', tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the peers are torchvision's" in result.stdout
    (file,) = tmp_path.glob('backbone_*.json')
    rows = json.loads(file.read_text())['rows']
    names = {OURS, 'Swin-T', 'ConvNeXt-T', 'ResNet-50'}
    for task in ('inference', 'training'):
        mine = {row['name']: row for row in rows if row['task'] == task}
        assert set(mine) == names
        for name, row in mine.items():
            assert row['library'] == ('mmspatialmamba' if name == OURS else 'torchvision')
            assert row['ratios'][name]['median'] == 1 and set(row['ratios']) == names
            assert ('kept_bytes_a_pixel' in row) == (task == 'training')


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
def test_memory_of_a_step(tools):
    case = dict(name='ResNet-50', task='training', precision='float32', layout='channels_last', device='cpu')
    sizes = ('1x64x64', '2x256x256')
    small, large = (tools.measuring.in_fresh_process(tools.backbone.memory_of, dict(case, size=size)) for size in sizes)
    # The gradients and AdamW's two averages; activations grow with the image.
    assert small['rise_mib'] > 3 * 23.5e6 * 4 / 2**20
    assert large['rise_mib'] > small['rise_mib'] + 100
    assert small['peak_mib'] > small['rise_mib']
