from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.engine import ResumableCheckpointHook
from mmspatialmamba.engine import checkpoint_hook as module
from mmspatialmamba.engine.checkpoint_hook import (
    AtomicLocalBackend,
    find_intact_checkpoint,
    get_random_state,
    is_intact,
    set_random_state,
)


def draw() -> list[float]:
    return [random.gauss(0, 1), np.random.normal(), torch.randn(1).item()]


def cut(path: Path) -> None:
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size * 2 // 3)


def test_it_is_mmengines_hook_with_the_same_arguments():
    hook = HOOKS.build({'type': 'ResumableCheckpointHook', 'interval': 3, 'save_best': 'auto', 'max_keep_ckpts': 2})
    assert isinstance(hook, ResumableCheckpointHook)
    assert isinstance(hook, CheckpointHook)
    assert (hook.interval, hook.max_keep_ckpts, hook.save_best) == (3, 2, ['auto'])


def test_random_state_survives_a_file_read_with_weights_only(tmp_path):
    # Both Python's and NumPy's generators hold back every second normal number.
    draw()
    torch.save(get_random_state(), tmp_path / 'state.pth')
    expected = [draw() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert draw() != expected[0]
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert [draw() for _ in range(3)] == expected


put = AtomicLocalBackend().put


class TestAtomicLocalBackend:
    def test_replaces_and_leaves_nothing_else(self, tmp_path):
        for data in (b'old', b'new'):
            put(data, tmp_path / 'deep' / 'file')
        assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['file']
        assert (tmp_path / 'deep' / 'file').read_bytes() == b'new'

    def test_is_on_the_disk_before_it_takes_the_name(self, tmp_path, monkeypatch):
        path, calls = tmp_path / 'file', []
        put(b'old', path)
        fsync, replace = os.fsync, os.replace

        def spy_fsync(descriptor: int) -> None:
            calls.append(('fsync', path.read_bytes(), os.stat(descriptor).st_size))
            fsync(descriptor)

        def spy_replace(source: os.PathLike, target: str) -> None:
            calls.append(('replace', path.read_bytes(), Path(source).read_bytes()))
            replace(source, target)

        monkeypatch.setattr(os, 'fsync', spy_fsync)
        monkeypatch.setattr(os, 'replace', spy_replace)
        put(b'newer', path)
        assert calls[:2] == [('fsync', b'old', 5), ('replace', b'old', b'newer')]
        assert [name for name, *_ in calls] == ['fsync', 'replace', 'fsync']

    def test_full_disk_leaves_the_old_file(self, tmp_path):
        path = tmp_path / 'file'
        put(b'old', path)
        # What is written to /dev/full fails with ENOSPC.
        (tmp_path / 'file.incomplete').symlink_to('/dev/full')
        with pytest.raises(CheckpointError) as error:
            put(b'new', path)
        assert str(error.value).startswith(f'cannot write {path}: No space left on device.')
        assert '\n' not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ['file']
        assert path.read_bytes() == b'old'

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / 'file').touch()
        with pytest.raises(CheckpointError, match='cannot write .*x.pth: File exists'):
            put(b'', tmp_path / 'file' / 'x.pth')

    def test_an_interrupt_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / 'file'
        put(b'old', path)

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, 'fsync', interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(b'new', path)
        assert [p.name for p in tmp_path.iterdir()] == ['file']
        assert path.read_bytes() == b'old'


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints of epochs 1, 2, 9, 10."""
    paths = {epoch: tmp_path / f'epoch_{epoch}.pth' for epoch in (1, 2, 9, 10)}
    for path in paths.values():
        torch.save({'weights': torch.arange(1000.0)}, path)
    return paths


def damage_nothing(path: Path) -> None:
    pass


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ('damage', 'intact'),
    [
        (damage_nothing, True),
        (cut, False),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), False),
        (overwrite, False),
        (fill_with_zeros, False),
        (lambda path: path.write_bytes(b''), False),
        (Path.unlink, False),
    ],
    ids=['whole', 'cut', 'last byte missing', 'bit flipped', 'zeros', 'empty', 'missing'],
)
def test_is_intact(checkpoints, damage, intact):
    damage(checkpoints[10])
    assert is_intact(checkpoints[10]) is intact


def test_damage_in_the_table_of_contents_is_no_error(checkpoints):
    """zipfile raises errors of many classes there."""
    data = checkpoints[10].read_bytes()
    start = data.index(b'PK\x01\x02')
    for position in range(start, len(data)):
        for bit in (0, 3, 7):
            checkpoints[10].write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            assert is_intact(checkpoints[10]) in (True, False)
    checkpoints[10].write_bytes(data[:start] + bytes(len(data) - start))
    assert not is_intact(checkpoints[10])


@pytest.mark.parametrize(
    ('last', 'damaged', 'expected'),
    [(10, [], 10), (9, [], 9), (10, [10], 9), (9, [9], 2), (10, [10, 9, 2], 1), (10, [1, 2, 9, 10], None)],
)
def test_find_intact_checkpoint(checkpoints, last, damaged, expected):
    for epoch in damaged:
        cut(checkpoints[epoch])
    shutil.copy(checkpoints[1], checkpoints[1].with_name('epoch_8.pth.incomplete'))
    shutil.copy(checkpoints[1], checkpoints[1].with_name('best_loss_epoch_8.pth'))
    found = find_intact_checkpoint(str(checkpoints[last]), 'epoch_{}.pth')
    assert found == (None if expected is None else str(checkpoints[expected]))


def test_find_intact_checkpoint_in_a_folder_that_is_gone(tmp_path):
    assert find_intact_checkpoint(tmp_path / 'gone' / 'epoch_3.pth', 'epoch_{}.pth') is None


def test_a_deprecated_argument_is_refused():
    hook = ResumableCheckpointHook(file_client_args={'backend': 'disk'})
    with pytest.raises(ValueError, match='use backend_args'):
        hook.before_train(SimpleNamespace())


def test_workers_are_seeded_by_worker_and_epoch():
    def seeded(worker: int, epoch: int, init=torch.manual_seed) -> list[float]:
        module._seed_worker(init, epoch, worker)
        return draw()

    state = get_random_state()
    numbers = {(worker, epoch): seeded(worker, epoch) for worker in range(3) for epoch in range(3)}
    assert numbers == {key: seeded(*key) for key in numbers}
    assert len({tuple(drawn) for drawn in numbers.values()}) == 9
    torch.manual_seed(7)
    assert seeded(0, 1, None) == seeded(7, 1)
    set_random_state(state)


class Line(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, mode: str = 'tensor'):
        y = self.fc(x)
        return {'loss': y.square().mean()} if mode == 'loss' else [y]


class Falling(BaseMetric):
    """A metric that is best in epochs 1 and 3."""

    values = iter((3.0, 4.0, 1.0))

    def process(self, data_batch: dict, data_samples: list) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {'loss': next(self.values)}


def test_order_of_writing_and_removing(tmp_path, monkeypatch):
    (tmp_path / 'epoch_7.pth.incomplete').write_bytes(b'half')
    loader = {'dataset': [{'x': torch.ones(1)}] * 2, 'sampler': {'type': 'DefaultSampler'}, 'batch_size': 1}
    loader['collate_fn'] = {'type': 'default_collate'}
    calls = []
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, 'replace', lambda a, b: (replace(a, b), calls.append(f'write {Path(b).name}')))
    monkeypatch.setattr(os, 'remove', lambda path: (unlink(Path(path)), calls.append(f'remove {Path(path).name}')))
    runner = Runner(
        Line(),
        str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg={'by_epoch': True, 'max_epochs': 3},
        val_cfg={},
        val_evaluator=Evaluator([Falling()]),
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={
            'checkpoint': {'type': 'ResumableCheckpointHook', 'interval': 1, 'max_keep_ckpts': 1, 'save_best': 'loss'}
        },
        experiment_name='order',
        log_level='ERROR',
    )
    state = get_random_state()
    runner.train()
    set_random_state(state)
    assert calls == [
        *('write epoch_1.pth', 'write last_checkpoint'),
        *('write best_loss_epoch_1.pth', 'write epoch_1.pth', 'write last_checkpoint'),
        *('write epoch_2.pth', 'write last_checkpoint', 'remove epoch_1.pth'),
        *('write epoch_3.pth', 'write last_checkpoint', 'remove epoch_2.pth'),
        *('write best_loss_epoch_3.pth', 'write epoch_3.pth', 'write last_checkpoint', 'remove best_loss_epoch_1.pth'),
    ]
    assert sorted(path.name for path in tmp_path.glob('*_*'))[-3:] == [
        *('best_loss_epoch_3.pth', 'epoch_3.pth', 'last_checkpoint')
    ]
    assert not list(tmp_path.glob('*.incomplete'))
