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
from test_ops.truth import relative_error

from mmspatialmamba import ops
from mmspatialmamba.models import SpatialMamba

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

    times = tools.measuring.measure({'a': subject('a', 0.002), 'b': subject('b', 0.004)}, 'cpu', 0, rounds=(4, 9))
    assert calls[-8:] == ['a', 'b'] * 4
    assert {name: len(values) for name, values in times.items()} == {'a': 4, 'b': 4}
    assert 2 <= np.median(times['a']) < np.median(times['b'])


def test_spread(tools):
    assert tools.measuring.spread(np.array([1.0, 2.0, 3.0, 4.0, 50.0])) == {'median': 3.0, 'q25': 2.0, 'q75': 4.0}


def test_kept_bytes_counts_each_storage_once(tools):
    x, y = (torch.rand(10, 10, requires_grad=True) for _ in range(2))
    assert tools.ops.kept_bytes(lambda x, y: x * y, (x, y)) == 2 * 400
    assert tools.ops.kept_bytes(lambda x, y: x * x.T, (x, y)) == 400
    assert tools.ops.kept_bytes(lambda x, y: x + y, (x, y)) == 0


@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
def test_eager_composition_is_the_op(tools, layout):
    inputs = tools.ops.make_inputs(2, 3, 9, 8, torch.float32, layout, 'cpu')
    assert relative_error(tools.ops.fused('torch', *inputs), tools.ops.eager(*inputs)) < 1e-6


def test_the_op_keeps_its_inputs_alone(tools):
    inputs = tools.ops.make_inputs(1, 3, 9, 8, torch.float32, 'channels_last', 'cpu')
    leaves = [t.requires_grad_() for t in inputs]
    assert tools.ops.kept_bytes(lambda *t: tools.ops.fused('torch', *t), leaves) == sum(t.nbytes for t in inputs)


def test_python_loop_is_the_scan(tools):
    u, delta, B = torch.rand(2, 3, 20), torch.rand(2, 3, 20), torch.rand(2, 1, 20)
    A = -torch.rand(3, 1)
    h = ops.selective_scan(u, delta, A, B)[:, :, 0]
    assert relative_error(tools.ops.python_loop(u, delta, A, B), h) < 1e-6


def test_the_op_alone_has_the_backbone_s_shapes(tools, monkeypatch):
    from mmspatialmamba.models.layers import mixer

    seen, scan = [], mixer.structure_aware_scan

    def record(u, *others):
        seen.append((u.shape, others[1].shape, others[2].shape))
        return scan(u, *others)

    monkeypatch.setattr(mixer, 'structure_aware_scan', record)
    # With gradients: without, a block is one op.
    SpatialMamba('tiny').eval()(torch.rand(1, 3, 40, 72))
    alone = tools.backbone.OpAlone('1x40x72', 'cpu')
    shapes = [(t[0].shape, t[2].shape, t[3].shape) for depth, t in alone.stages for _ in range(depth)]
    assert shapes == seen


@pytest.mark.parametrize('library', ['mmpretrain', 'torchvision'])
@pytest.mark.parametrize(
    'name, millions', [('Swin-T', 27.5), ('ConvNeXt-T', 27.8), ('ResNet-50', 23.5)], ids=['swin', 'convnext', 'resnet']
)
def test_peers_are_the_published_networks(tools, library, name, millions):
    model = tools.backbone.build(name, library)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_training_step_changes_the_weights(tools):
    step = tools.backbone.Step('ResNet-50', 'torchvision', 'training', 'float32', 'channels_last', '2x32x32', 'cpu')
    before = step.model[0].weight.detach().clone()
    step()
    assert step.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(before, step.model[0].weight)


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
    result = run(*command, '--out', tmp_path, '--dtypes', 'float32', '--from-memory', 1, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob('ops_*.json')
    record = json.loads(file.read_text())
    assert file.with_suffix('.png').is_file()
    assert record['machine']['threads'] == 1 and 'tf32_matmul' in record['machine']
    assert 'torch' in record['machine']['versions']
    assert {row['backend'] for row in record['rows']} >= {'torch', 'eager'}
    for row in record['rows']:
        assert (row['dtype'], row['layout']) == ('float32', 'channels_last')
        for part in ('forward', 'both'):
            assert row[part]['to_floor']['q25'] <= row[part]['to_floor']['median'] <= row[part]['to_floor']['q75']
        if row['backend'] == 'eager':
            assert row['both']['eager_to_this']['median'] == 1
    assert record['python_loop']['both']['loop_to_this']['median'] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    'bare, tasks', [(False, ('inference', 'training')), (True, ('inference',))], ids=['openmmlab', 'bare']
)
def test_benchmark_backbone(bare, tasks, tmp_path):
    if bare:
        (tmp_path / 'sitecustomize.py').write_text(BLOCK)
    command = (sys.executable, TOOLS / 'benchmark_backbone.py', '--quick', '--threads', 1, '--device', 'cpu')
    command += ('--inference', '1x64x64', '--training', *['1x64x64'][: len(tasks) - 1])
    command += ('--precisions', 'float32', '--no-memory')
    result = run(*command, '--out', tmp_path, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
    assert result.returncode == 0, result.stderr
    assert ("the peers are torchvision's" in result.stdout) == bare
    (file,) = tmp_path.glob('backbone_*.json')
    record = json.loads(file.read_text())
    assert file.with_suffix('.png').is_file()
    assert record['without_openmmlab'] == bare
    models = {
        OURS: 'mmspatialmamba',
        **dict.fromkeys(('Swin-T', 'ConvNeXt-T', 'ResNet-50'), record['rows'][1]['library']),
    }
    assert {row['task'] for row in record['rows']} == set(tasks)
    for task in tasks:
        rows = {row['model']: row['library'] for row in record['rows'] if row['task'] == task}
        assert rows == models | ({'structure_aware_scan': 'mmspatialmamba'} if task == 'inference' else {})
    assert models['Swin-T'] == ('torchvision' if bare else 'mmpretrain')


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from without_openmmlab import stand_in
stand_in()
from mmspatialmamba.models import SpatialMamba
state, image, outputs = torch.load(sys.argv[2])
model = SpatialMamba('tiny').eval()
model.load_state_dict(state)
with torch.no_grad():
    torch.testing.assert_close(model(image), outputs, rtol=0, atol=0)
assert model.train().stages[3][3].drop_path.keep == 0.8
print('same')
"""


@pytest.mark.slow
def test_backbone_without_openmmlab_is_the_same(tmp_path):
    model, image = SpatialMamba('tiny').eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.save((model.state_dict(), image, model(image)), tmp_path / 'model.pth')
    (tmp_path / 'sitecustomize.py').write_text(BLOCK)
    path = f'{tmp_path}{os.pathsep}{ROOT}'
    result = run(sys.executable, '-c', CHILD, TOOLS, tmp_path / 'model.pth', PYTHONPATH=path)
    assert result.stdout == 'same\n', result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
def test_memory_of_a_step(tools, tmp_path):
    args = SimpleNamespace(device='cpu', out=tmp_path)
    case = ('ResNet-50', 'torchvision', 'training', 'float32', 'channels_last')
    small = tools.backbone.take_memory(args, *case, '1x64x64')
    large = tools.backbone.take_memory(args, *case, '2x256x256')
    # The gradients and AdamW's two averages; activations grow with the image.
    assert small['rise_mib'] > 3 * 23.5e6 * 4 / 2**20
    assert large['rise_mib'] > small['rise_mib'] + 100
    assert small['peak_mib'] > small['rise_mib']
