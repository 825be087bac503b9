from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmspatialmamba.engine.checkpoint_hook import is_intact

pytestmark = pytest.mark.slow

OPTIONS = {'by_epoch': True, 'end': 3, 'max_keep_ckpts': 2}


def cut(path: Path) -> None:
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size * 2 // 3)


@pytest.fixture(scope='module')
def finished(trainer, tmp_path_factory):
    """The folder of a run of three epochs."""
    work_dir = tmp_path_factory.mktemp('finished')
    status, _, output = trainer.train(**OPTIONS, work_dir=work_dir)
    assert status == 0, output
    return work_dir


@pytest.fixture
def work_dir(finished, tmp_path):
    """A copy of that folder, as if the run had ended after its last checkpoint was saved."""
    for path in finished.glob('*.pth'):
        shutil.copy(path, tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    return tmp_path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)['state_dict']


def test_a_damaged_checkpoint_is_skipped_with_a_warning(trainer, work_dir, finished):
    cut(work_dir / 'epoch_3.pth')
    status, events, output = trainer.train(**OPTIONS, work_dir=work_dir, resume=True)
    assert status == 0, output
    message = f'{work_dir}/epoch_3.pth is missing or damaged: the run goes on from {work_dir}/epoch_2.pth'
    assert message in output
    assert events.count('iteration') == 3
    expected = weights(finished / 'epoch_3.pth')
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(work_dir / 'epoch_3.pth').items())


def test_nothing_but_damaged_checkpoints_is_an_error(trainer, work_dir):
    for path in work_dir.glob('*.pth'):
        cut(path)
    before = {path: path.read_bytes() for path in work_dir.iterdir() if path.is_file()}
    status, events, output = trainer.train(**OPTIONS, work_dir=work_dir, resume=True)
    assert (status, events) == (1, [])
    assert 'put a whole one into the work_dir, or start anew with another work_dir' in output
    assert {path: path.read_bytes() for path in before} == before


def test_leftovers_are_removed_at_the_next_start(trainer, work_dir):
    for name in ('epoch_3.pth', 'best_loss_epoch_1.pth', 'last_checkpoint'):
        (work_dir / f'{name}.incomplete').write_bytes(b'half')
    status, events, output = trainer.train(**OPTIONS, work_dir=work_dir, resume=True)
    assert status == 0, output
    assert events == ['evaluation']
    assert not list(work_dir.glob('*.incomplete'))
    assert len(list(work_dir.glob('*.pth'))) == 2


def test_an_outdated_checkpoint_a_killed_run_left_is_removed(trainer, work_dir):
    shutil.copy(work_dir / 'epoch_2.pth', work_dir / 'epoch_1.pth')
    status, _, output = trainer.train(**OPTIONS, work_dir=work_dir, resume=True)
    assert status == 0, output
    assert sorted(path.name for path in work_dir.glob('*.pth')) == ['epoch_2.pth', 'epoch_3.pth']


def test_without_a_checkpoint_resuming_starts_anew(trainer, tmp_path, finished):
    status, events, output = trainer.train(**OPTIONS, work_dir=tmp_path, resume=True)
    assert status == 0, output
    assert events.count('iteration') == 9
    assert list(weights(tmp_path / 'epoch_3.pth')) == list(weights(finished / 'epoch_3.pth'))


@pytest.mark.parametrize('full_at', [0, 6], ids=['first checkpoint', 'third checkpoint'])
def test_a_full_disk_leaves_the_last_good_checkpoint(trainer, tmp_path, finished, full_at):
    status, events, output = trainer.train(**OPTIONS, work_dir=tmp_path, full_at=full_at)
    assert status == 1
    assert events[-1] == 'write'
    failed = full_at // 3 + 1
    assert f'CheckpointError: cannot write {tmp_path}/epoch_{failed}.pth: File too large.' in output
    names = [f'epoch_{epoch}.pth' for epoch in range(1, failed)]
    assert sorted(path.name for path in tmp_path.glob('epoch_*')) == names
    assert all(is_intact(tmp_path / name) for name in names)
    assert (tmp_path / 'last_checkpoint').exists() == bool(names)
    status, _, output = trainer.train(**OPTIONS, work_dir=tmp_path, resume=True)
    assert status == 0, output
    expected = weights(finished / 'epoch_3.pth')
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / 'epoch_3.pth').items())


@pytest.mark.parametrize(
    ('change', 'warning'),
    [
        (lambda c: c.pop('random_states'), 'holds no random state'),
        (lambda c: c['random_states'].append(c['random_states'][0]), 'of 2 processes, and these are 1'),
        (lambda c: c['meta'].update(seed=7), 'of a run with random seed 7, and this one is set up with 0'),
    ],
    ids=['no states', 'other number of processes', 'other seed'],
)
def test_what_cannot_be_restored_is_said(trainer, work_dir, change, warning):
    checkpoint = torch.load(work_dir / 'epoch_3.pth', weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, work_dir / 'epoch_3.pth')
    status, _, output = trainer.train(**OPTIONS, work_dir=work_dir, resume=True)
    assert status == 0, output
    assert warning in output


def test_checkpoints_by_iteration_in_a_loop_by_epoch_are_warned_of(trainer, tmp_path):
    status, _, output = trainer.train(by_epoch=True, end=1, work_dir=tmp_path, hook_by_epoch=False)
    assert status == 0, output
    assert 'Set by_epoch=True in the checkpoint hook' in output
