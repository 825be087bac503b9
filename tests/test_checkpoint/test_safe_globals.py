"""What of mmengine's training checkpoints is read, by torch since 2.6 and by our own reader below it."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmspatialmamba.checkpoint.safe_globals import allow_training_checkpoints, load_below_2_6, load_weights_only

READERS = pytest.mark.parametrize('read', [load_weights_only, load_below_2_6], ids=['this torch', 'torch below 2.6'])

TRAIN = """
    import sys

    import numpy as np
    import torch
    from mmengine.evaluator import BaseMetric, Evaluator
    from mmengine.model import BaseModel
    from mmengine.runner import Runner


    class Points(torch.utils.data.Dataset):
        metainfo = dict(classes=('a', 'b'), palette=[(1, 2, 3), (4, 5, 6)])

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return dict(x=torch.tensor([float(index), 1.0]))


    class Line(BaseModel):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 1)
            self.bn = torch.nn.BatchNorm1d(1)

        def forward(self, x, mode='tensor'):
            y = self.bn(self.fc(x))
            return dict(loss=y.square().mean()) if mode == 'loss' else [y]


    class Score(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(1)

        def compute_metrics(self, results):
            return dict(mIoU=np.float32(0.5), aAcc=np.float64(0.5))


    def loader():
        return dict(
            dataset=Points(),
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        )


    work_dir, epochs, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'resume'
    runner = Runner(
        Line(),
        work_dir,
        train_dataloader=loader(),
        val_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=Evaluator([Score()]),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
            dict(type='MultiStepLR', milestones=[2, 3]),
            dict(type='CosineAnnealingLR', T_max=8),
            dict(type='PolyLR'),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=9),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=9, anneal_strategy='linear'),
            dict(type='ReduceOnPlateauLR', monitor='mIoU', rule='greater'),
        ],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='mIoU')),
        custom_hooks=[dict(type='EMAHook')],
        resume=resume,
        experiment_name='line',
        randomness=dict(seed=0),
    )
    runner.train()
    print('reached epoch', runner.epoch)
"""
LOAD = """
    import sys

    from mmengine.runner import load_checkpoint
    from torch import nn

    model = nn.Module()
    model.fc = nn.Linear(2, 1)
    model.bn = nn.BatchNorm1d(1)
    for path in sys.argv[1:]:
        checkpoint = load_checkpoint(model, path, strict=True)
        history = checkpoint['message_hub']['log_scalars']['train/loss']
        print(path, checkpoint['meta']['epoch'], len(history.data[0]), history.mean())
"""


def run_python(code: str, *args: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith('TORCH_FORCE')}
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp('line')
    result = run_python(TRAIN, path, 2, 'scratch')
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope='module')
def checkpoints(work_dir):
    paths = sorted(work_dir.glob('*.pth'))
    assert [path.name for path in paths] == [
        'best_mIoU_epoch_1.pth',
        'epoch_1.pth',
        'epoch_2.pth',
    ]
    return paths


@pytest.mark.slow
def test_mmengine_loads_its_checkpoints_once_the_package_is_imported(checkpoints):
    result = run_python('import mmspatialmamba\n' + textwrap.dedent(LOAD), *checkpoints)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if '.pth 2 4 ' in line]) == 1


@pytest.mark.slow
def test_without_the_package_they_are_refused(checkpoints):
    result = run_python(LOAD, checkpoints[-1])
    assert result.returncode != 0
    assert 'UnpicklingError' in result.stderr


@pytest.mark.slow
def test_runner_resumes_once_the_package_is_imported(work_dir, checkpoints):
    result = run_python('import mmspatialmamba\n' + textwrap.dedent(TRAIN), work_dir, 3, 'resume')
    assert result.returncode == 0, result.stderr
    assert 'resumed epoch: 2' in result.stdout
    assert 'reached epoch 3' in result.stdout


@pytest.mark.slow
def test_the_list_holds_nothing_that_the_checkpoints_do_not(checkpoints):
    code = """
        import sys

        import numpy
        import torch

        from mmspatialmamba.checkpoint.safe_globals import allow_training_checkpoints

        torch.serialization.clear_safe_globals()
        needed = set()
        for path in sys.argv[1:]:
            needed.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        torch.serialization.clear_safe_globals()
        allow_training_checkpoints()
        names = {name for _, name in torch.serialization.get_safe_globals()}
        # The types of arrays' elements are checked, but a file does not name them.
        names -= {f'numpy.dtypes.{name}DType' for name in ('Float32', 'Float64', 'Int64')}
        names.remove('yacs.config.CfgNode')  # of the original release's checkpoints
        other = 'numpy.core.' if numpy.__version__ >= '2' else 'numpy._core.'
        print(sorted(n for n in names if not n.startswith(other)) == sorted(needed), names ^ needed)
    """
    result = run_python(code, *checkpoints)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('True'), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_both_readers_read_the_same(checkpoints, tmp_path, zipped):
    for path in checkpoints:
        expected = torch.load(path, weights_only=False)
        torch.save(expected, tmp_path / path.name, _use_new_zipfile_serialization=zipped)
        for read in (load_weights_only, load_below_2_6):
            found = read(tmp_path / path.name, 'cpu')
            assert list(found) == list(expected)
            for key in ('state_dict', 'ema_state_dict'):
                torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
                assert found[key]._metadata == expected[key]._metadata
            assert repr(found.get('optimizer')) == repr(expected.get('optimizer'))
            assert repr(found.get('param_schedulers')) == repr(expected.get('param_schedulers'))
            assert found['meta'] == expected['meta']
            assert found['message_hub']['runtime_info'] == expected['message_hub']['runtime_info']
            for name, history in expected['message_hub']['log_scalars'].items():
                again = found['message_hub']['log_scalars'][name]
                assert type(again) is HistoryBuffer
                np.testing.assert_array_equal(again.data, history.data)


@READERS
@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_arrays_written_with_numpy_1_and_2_load(tmp_path, module, read):
    allow_training_checkpoints()
    path = tmp_path / 'history.pth'
    state = {'history': HistoryBuffer([1.0, 2.0], [1, 1]), 'best': np.float32(0.5)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for written in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        data = data.replace(b'c' + written + b'\n', b'c' + module.encode() + b'\n')
    assert f'c{module}\n_reconstruct\n'.encode() in data
    assert f'c{module}\nscalar\n'.encode() in data
    path.write_bytes(data)
    loaded = read(path)
    np.testing.assert_array_equal(loaded['history'].data[0], [1.0, 2.0])
    assert loaded['history'].statistics('mean') == 1.5
    assert loaded['best'] == np.float32(0.5)


class Reduced:
    """An object that pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class NamedGlobal:
    """A HistoryBuffer state that smuggles a function in as a statistics method."""

    def __reduce__(self):
        return HistoryBuffer, (), {'statistics_methods': {'mean': os.system}}


@READERS
@pytest.mark.parametrize(
    ('payload', 'reason'),
    [
        (lambda path: Reduced(os.system, f'touch {path}'), 'system'),
        (lambda path: Reduced(eval, f'open({str(path)!r}, "w")'), 'eval'),
        (lambda path: NamedGlobal(), 'system'),
        (lambda path: Reduced(getattr, HistoryBuffer, 'register_statistics'), 'register_stat'),
        (lambda path: Reduced(getattr, HistoryBuffer.mean, '__globals__'), '__globals__'),
        (lambda path: Reduced(getattr, np.ndarray, 'tofile'), 'tofile'),
        (lambda path: np.array([1], object), 'ObjectDType|object'),
        (lambda path: np.zeros(1, [('a', 'i4')]), 'Int32DType|int32'),
        (lambda path: torch.nn.Linear(1, 1), 'Linear'),
    ],
    ids=['os.system', 'eval', 'system as statistics', 'getattr', 'globals', 'tofile', 'objects', 'records', 'module'],
)
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_hostile_checkpoints_are_still_refused(tmp_path, payload, reason, zipped, read):
    allow_training_checkpoints()
    touched = tmp_path / 'touched'
    path = tmp_path / 'hostile.pth'
    contents = {'state_dict': {}, 'message_hub': payload(touched)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match=reason):
        read(path)
    assert not touched.exists()


ONE_CYCLE = b'cmmengine.optim.scheduler.param_scheduler\nOneCycleParamScheduler\n'
HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
ORDERED = b'ccollections\nOrderedDict\n'


@READERS
@pytest.mark.parametrize(
    'program',
    {
        'attribute of a class': ONE_CYCLE + b'N}X\x07\x00\x00\x00hostileI01\ns\x86b',
        'attribute of a function': b'ctorch._utils\n_rebuild_tensor_v2\n}X\x07\x00\x00\x00hostileI01\nsb',
        'call of what was looked up': (
            b'c__builtin__\ngetattr\n' + HISTORY + b'X\x03\x00\x00\x00min\x86R' + HISTORY + b')R\x85R'
        ),
        'instance of what only is a value': ORDERED + b')R)\x81',
        'instance, old way': b"(S'touch hostile'\nios\nsystem\n",
        'instance, other old way': b'(' + ORDERED + b'o',
        'global of protocol 4': b'\x8c\x02os\x8c\x06system\x93',
        'global with a dot': HISTORY[:-1] + b'.__init__.__globals__\n',
        'extension': b'\x82\x01',
        'reference to source code': (b'(X\x06\x00\x00\x00module' + HISTORY + b'X\x01\x00\x00\x00fX\x01\x00\x00\x00xtQ'),
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_programs_are_refused(tmp_path, monkeypatch, program, read):
    allow_training_checkpoints()
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile('hostile.pth', 'w') as archive:
        archive.writestr('hostile/data.pkl', b'\x80\x02' + program[1] + b'.')
        archive.writestr('hostile/version', '3')
    with pytest.raises(pickle.UnpicklingError):
        read('hostile.pth')
    for found in (torch._utils._rebuild_tensor_v2, HistoryBuffer, HistoryBuffer.min):
        assert not hasattr(found, 'hostile')
    assert os.listdir() == ['hostile.pth']


@READERS
def test_archives_of_programs_and_of_files_are_refused(tmp_path, monkeypatch, read):
    path = tmp_path / 'program.pth'
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    run = []
    monkeypatch.setattr(torch.jit, 'load', lambda *args, **kwargs: run.append(args))
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match='TorchScript'):
        read(path)
    assert run == []
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match='tar'):
        read(path)
