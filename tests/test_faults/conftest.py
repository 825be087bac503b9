from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from small_runs import cpu_environment


class Trainer:
    """A server that trains in a new process for each request: trainer.py."""

    def __init__(self, process: subprocess.Popen, reports: TextIO, log: Path) -> None:
        self.process, self.reports, self.log = process, reports, log

    def train(
        self, on_event: Callable[[int, str], None] | None = None, **options: object
    ) -> tuple[int, list[str], str]:
        """Train in a new process.

        Args:
            on_event (Callable, optional): Called with the process id and each event the process reports.
                Defaults to None.
            **options: The arguments of trainer.py's `train`.

        Returns:
            tuple[int, list[str], str]: The exit status, as of `subprocess.Popen.returncode`; the events; what
            the process printed.
        """
        self.process.stdin.write(json.dumps({key: _plain(value) for key, value in options.items()}) + '\n')
        self.process.stdin.flush()
        pid, events, printed = 0, [], self.log.stat().st_size
        for line in self.reports:
            event, *number = line.split()
            if event == 'started':
                pid = int(number[0])
            elif event == 'ended':
                return int(number[0]), events, self.log.read_bytes()[printed:].decode()
            else:
                events.append(event)
                if on_event is not None:
                    on_event(pid, event)
        raise AssertionError(self.log.read_text())


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


@pytest.fixture(scope='session', autouse=True)
def heed_interrupts():
    """Undo what a shell does for a command in the background: it has SIGINT ignored, in processes it starts too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='session')
def trainer(tmp_path_factory):
    log = tmp_path_factory.mktemp('trainer') / 'log'
    reading, writing = os.pipe()
    with (
        open(reading) as reports,
        log.open('a') as printed,
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('trainer.py')), str(writing)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            text=True,
            env=cpu_environment(),
        ) as process,
    ):
        os.close(writing)
        yield Trainer(process, reports, log)
        process.stdin.close()
