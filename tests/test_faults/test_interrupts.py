from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace

import pytest
from mmengine.config import Config

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.engine import launch

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize('signum', SIGNALS, ids=lambda signum: signum.name)
@pytest.mark.parametrize('error', [KeyboardInterrupt, SyntaxError], ids=['passed on', 'turned into another error'])
def test_a_signal_interrupts(signum, error):
    before = [signal.getsignal(n) for n in (*SIGNALS, signal.SIGALRM)]
    with pytest.raises(launch.Interrupted) as interrupt, launch.interruptible():
        try:
            os.kill(os.getpid(), signum)
            time.sleep(60)
        except KeyboardInterrupt as cause:
            raise error from cause
    assert interrupt.value.args == (signum,)
    assert [signal.getsignal(n) for n in (*SIGNALS, signal.SIGALRM)] == before
    assert signal.alarm(0) == 0


def test_windows_has_no_alarm(monkeypatch):
    monkeypatch.delattr(signal, 'SIGALRM')
    monkeypatch.delattr(signal, 'alarm')
    with pytest.raises(launch.Interrupted) as interrupt, launch.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert interrupt.value.args == (signal.SIGINT,)


@pytest.mark.slow
def test_a_swallowed_interrupt_is_repeated():
    begin, swallowed = time.monotonic(), False
    with pytest.raises(launch.Interrupted), launch.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            swallowed = True
        time.sleep(60)
    assert swallowed
    assert time.monotonic() - begin < 30


def test_without_a_signal_errors_pass():
    with pytest.raises(SyntaxError), launch.interruptible():
        raise SyntaxError


@pytest.mark.parametrize(
    ('work_dir', 'cfg_work_dir', 'folder'),
    [('cli', 'cfg', 'cli'), (None, 'cfg', 'cfg'), (None, None, 'work_dirs/my_config')],
    ids=['command line', 'config', 'default'],
)
def test_advice_names_the_last_checkpoint(tmp_path, monkeypatch, work_dir, cfg_work_dir, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_config.py').touch()
    cfg = Config({'work_dir': cfg_work_dir} if cfg_work_dir else {}, filename='my_config.py')
    args = Namespace(work_dir=work_dir)
    assert f'no checkpoint was saved in {folder} yet' in launch.resume_advice(cfg, args)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / 'last_checkpoint').write_text('here/epoch_3.pth')
    advice = launch.resume_advice(cfg, args)
    assert 'here/epoch_3.pth' in advice
    assert '--resume' in advice
    # The folder was moved.
    (tmp_path / folder / 'epoch_3.pth').touch()
    assert f'to continue from {tmp_path / folder}/epoch_3.pth, run' in launch.resume_advice(cfg, args)


@pytest.mark.parametrize(
    ('error', 'status', 'printed'),
    [
        (CheckpointError('cannot write x: disk full'), 1, 'train.py: cannot write x: disk full\n'),
        (launch.Interrupted(signal.SIGINT), 130, ''),
        (launch.Interrupted(signal.SIGTERM), 143, ''),
    ],
    ids=['full disk', 'SIGINT', 'SIGTERM'],
)
def test_exit_status(monkeypatch, capsys, error, status, printed):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(launch, 'launch', fail)
    monkeypatch.setattr(sys, 'argv', ['train.py', 'config.py'])
    assert launch.main('train') == status
    assert capsys.readouterr().err == printed
