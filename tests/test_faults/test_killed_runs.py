from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.runner import find_latest_checkpoint

from mmspatialmamba.engine.checkpoint_hook import is_intact

KINDS = ('iteration', 'evaluation', 'write')


def load(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


def differences(a: object, b: object, name: str = 'checkpoint') -> list[str]:
    """List where two nested states differ, by a single bit or more."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict):
        found = [] if list(a) == list(b) else [f'keys of {name}']
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f'{name}.{key}')]
    if isinstance(a, (list, tuple)):
        found = [] if len(a) == len(b) else [f'length of {name}']
        return found + [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{name}[{i}]')]
    return [] if a == b else [name]


def assert_same_end(work_dir: Path, undisturbed: Path) -> None:
    """Assert that two runs ended with the same training state and the same best checkpoint."""
    last, expected = find_latest_checkpoint(str(work_dir)), find_latest_checkpoint(str(undisturbed))
    assert Path(last).name == Path(expected).name
    last, expected = load(last), load(expected)
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_states'):
        assert differences(last[key], expected[key], key) == []
    best, expected_best = (c['message_hub']['runtime_info'] for c in (last, expected))
    assert best['best_score'] == expected_best['best_score']
    assert Path(best['best_ckpt']).name == Path(expected_best['best_ckpt']).name
    best, expected_best = load(best['best_ckpt']), load(expected_best['best_ckpt'])
    assert differences(best['state_dict'], expected_best['state_dict']) == []


def kill_and_resume(trainer, kills: int, options: dict, seed: int) -> Counter:
    """Kill a training at random moments, resume it each time, and at last let it end.

    Returns:
        Counter: How often it was killed in each of KINDS.
    """
    rng = random.Random(seed)
    print(f'moments of killing: seed {seed}')
    hit = Counter()
    for number in range(kills):
        wanted = KINDS[number % 3]
        countdown = rng.randrange(1, 4) if wanted == 'iteration' else 1
        # Every second kill comes at once, to be sure of its kind; the others some moments later, wherever that is.
        delay = 0 if number % 2 else rng.uniform(0, 0.06)

        def kill(pid: int, event: str, wanted=wanted, delay=delay) -> None:
            nonlocal countdown
            countdown -= event == wanted
            if countdown == 0:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                countdown = -1

        status, events, output = trainer.train(kill, **options, resume=True)
        assert status == -signal.SIGKILL, output
        hit[events[-1]] += 1
        last = find_latest_checkpoint(str(options['work_dir']))
        assert last is None or is_intact(last)
    status, _, output = trainer.train(**options, resume=True)
    assert status == 0, output
    print('killed in', dict(hit))
    return hit


@pytest.mark.slow
def test_twenty_kills_and_the_same_weights(trainer, tmp_path):
    options = {'by_epoch': True, 'end': 24, 'max_keep_ckpts': 2, 'save_best': 'loss'}
    status, events, output = trainer.train(**options, work_dir=tmp_path / 'undisturbed')
    assert status == 0, output
    assert events.count('evaluation') == 24
    hit = kill_and_resume(trainer, 20, {**options, 'work_dir': tmp_path / 'killed'}, seed=random.randrange(10**6))
    assert sum(hit.values()) == 20
    assert all(hit[kind] > 0 for kind in KINDS), hit
    assert_same_end(tmp_path / 'killed', tmp_path / 'undisturbed')
    assert sorted(p.name for p in (tmp_path / 'killed').glob('epoch_*')) == ['epoch_23.pth', 'epoch_24.pth']
    assert not list((tmp_path / 'killed').glob('*.incomplete'))


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        {'by_epoch': False, 'end': 14, 'interval': 2},
        {'by_epoch': False, 'end': 14, 'interval': 2, 'workers': 2},
        {'by_epoch': True, 'end': 5, 'workers': 2},
    ],
    ids=['iterations', 'iterations, workers', 'epochs, persistent workers'],
)
def test_killed_runs_end_with_the_same_weights(trainer, tmp_path, options):
    options = {**options, 'max_keep_ckpts': 2, 'save_best': 'loss'}
    status, _, output = trainer.train(**options, work_dir=tmp_path / 'undisturbed')
    assert status == 0, output
    kill_and_resume(trainer, 3, {**options, 'work_dir': tmp_path / 'killed'}, seed=random.randrange(10**6))
    assert_same_end(tmp_path / 'killed', tmp_path / 'undisturbed')
