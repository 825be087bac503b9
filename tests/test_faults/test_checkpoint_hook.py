from __future__ import annotations

import errno
import os
import random
import shutil
import stat
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

    @pytest.mark.parametrize('code', [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES])
    @pytest.mark.parametrize('function', ['open', 'fsync'])
    def test_folders_that_cannot_be_opened_or_flushed(self, tmp_path, monkeypatch, function, code):
        original, refused = getattr(os, function), []

        def refuse(target, *args):
            if stat.S_ISDIR(os.stat(target).st_mode):
                refused.append(target)
                raise OSError(code, os.strerror(code))
            return original(target, *args)

        monkeypatch.setattr(os, function, refuse)
        put(b'new', tmp_path / 'file')
        assert refused
        assert (tmp_path / 'file').read_bytes() == b'new'

    @pytest.mark.parametrize(
        ('code', 'unsupported'),
        [(errno.EINVAL, True), (errno.EOPNOTSUPP, True), (errno.EIO, False), (errno.ENOSPC, False)],
    )
    def test_files_that_cannot_be_flushed(self, tmp_path, monkeypatch, code, unsupported):
        put(b'old', tmp_path / 'file')

        def refuse(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, 'fsync', refuse)
        if unsupported:
            put(b'new', tmp_path / 'file')
        else:
            with pytest.raises(CheckpointError, match=os.strerror(code)):
                put(b'new', tmp_path / 'file')
        assert [p.name for p in tmp_path.iterdir()] == ['file']
        assert (tmp_path / 'file').read_bytes() == (b'new' if unsupported else b'old')

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
    found = find_intact_checkpoint(str(checkpoints[last]), checkpoints[1].parent, 'epoch_{}.pth')
    assert found == (None if expected is None else str(checkpoints[expected]))


def test_find_intact_checkpoint_in_a_folder_that_is_gone(tmp_path):
    assert find_intact_checkpoint(tmp_path / 'gone' / 'epoch_3.pth', tmp_path, 'epoch_{}.pth') is None


@pytest.mark.parametrize(
    ('here', 'there', 'expected'),
    [
        ([9, 10], [], 'here/epoch_10.pth'),
        ([9, 10], [9, 10], 'here/epoch_10.pth'),
        ([9], [9, 10], 'there/epoch_10.pth'),
        ([1, 9], [1, 2], 'here/epoch_9.pth'),
        ([2], [1, 9], 'there/epoch_9.pth'),
    ],
    ids=['moved', 'copied', 'copied in part', 'damaged at both', 'damaged, and copied in part'],
)
def test_find_intact_checkpoint_in_two_folders(checkpoints, tmp_path, here, there, expected):
    for name, epochs in (('here', here), ('there', there)):
        (tmp_path / name).mkdir()
        for epoch in epochs:
            shutil.copy(checkpoints[epoch], tmp_path / name)
    found = find_intact_checkpoint(tmp_path / 'there/epoch_10.pth', tmp_path / 'here', 'epoch_{}.pth')
    assert found == str(tmp_path / expected)


def test_a_sharded_checkpoint_is_a_folder(tmp_path):
    (tmp_path / 'here' / 'epoch_3.pth').mkdir(parents=True)
    found = find_intact_checkpoint(tmp_path / 'gone' / 'epoch_3.pth', tmp_path / 'here', 'epoch_{}.pth')
    assert found == str(tmp_path / 'here' / 'epoch_3.pth')


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

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = iter(values)

    def process(self, data_batch: dict, data_samples: list) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {'loss': next(self.values)}


def train(work_dir: Path, epochs: int, *losses: float, resume: bool = False, **hook: object) -> Runner:
    """Train a line, with these losses in the evaluations."""
    loader = {'dataset': [{'x': torch.ones(1)}] * 2, 'sampler': {'type': 'DefaultSampler'}, 'batch_size': 1}
    loader['collate_fn'] = {'type': 'default_collate'}
    runner = Runner(
        Line(),
        str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        val_cfg={},
        val_evaluator=Evaluator([Falling(*losses)]),
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={'checkpoint': {'type': 'ResumableCheckpointHook', 'interval': 1, 'save_best': 'loss', **hook}},
        resume=resume,
        experiment_name=f'{work_dir} {epochs}',
        log_level='ERROR',
    )
    state = get_random_state()
    runner.train()
    set_random_state(state)
    return runner


def test_order_of_writing_and_removing(tmp_path, monkeypatch):
    (tmp_path / 'epoch_7.pth.incomplete').write_bytes(b'half')
    calls = []
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, 'replace', lambda a, b: (replace(a, b), calls.append(f'write {Path(b).name}')))
    monkeypatch.setattr(os, 'remove', lambda path: (unlink(Path(path)), calls.append(f'remove {Path(path).name}')))
    train(tmp_path, 3, 3.0, 4.0, 1.0, max_keep_ckpts=1)
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


def pth(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob('*.pth')}


@pytest.mark.parametrize('save_best', ['loss', ['loss', 'again']], ids=['a best one', 'several'])
def test_a_work_dir_is_moved_and_copied(tmp_path, monkeypatch, save_best):
    compute = Falling.compute_metrics
    monkeypatch.setattr(Falling, 'compute_metrics', lambda self, results: {'again': 1.0, **compute(self, results)})
    hook = {'max_keep_ckpts': 2, 'save_best': save_best, 'rule': 'less'}
    source, moved, copied = tmp_path / 'a', tmp_path / 'b', tmp_path / 'c'
    train(source, 2, 3.0, 4.0, **hook)
    shutil.copytree(source, copied)
    before = pth(source)
    assert {'best_loss_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth'} <= before.keys()

    runner = train(copied, 3, 4.0, 1.0, resume=True, **hook)
    assert runner._load_from == str(copied / 'epoch_2.pth')
    assert runner.iter == 6
    assert pth(source) == before
    expected = before.keys() - {'epoch_1.pth', 'best_loss_epoch_1.pth'} | {'epoch_3.pth', 'best_loss_epoch_3.pth'}
    assert pth(copied).keys() == expected
    assert (copied / 'last_checkpoint').read_text() == str(copied / 'epoch_3.pth')

    source.rename(moved)
    runner = train(moved, 3, 4.0, 1.0, resume=True, published_keys=['state_dict'], **hook)
    assert runner._load_from == str(moved / 'epoch_2.pth')
    assert not source.exists()
    assert pth(moved).keys() >= expected
    assert not (moved / 'best_loss_epoch_1.pth').exists()


def test_a_lost_note_of_the_last_checkpoint_costs_no_training(tmp_path):
    train(tmp_path, 2, 3.0, 4.0)
    (tmp_path / 'last_checkpoint').write_text('')
    runner = train(tmp_path, 3, 4.0, 1.0, resume=True)
    assert runner._load_from == str(tmp_path / 'epoch_2.pth')
    (tmp_path / 'last_checkpoint').unlink()
    runner = train(tmp_path, 4, 2.0, resume=True)
    assert runner._load_from == str(tmp_path / 'epoch_3.pth')
