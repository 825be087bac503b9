from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


class Trainer:
    """A server that trains in a new process for each request: trainer.py."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

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
        pid, events, output = 0, [], ''
        for line in self.process.stdout:
            if not line.startswith('> '):
                output += line
                continue
            event, *number = line.split()[1:]
            if event == 'started':
                pid = int(number[0])
            elif event == 'ended':
                return int(number[0]), events, output
            else:
                events.append(event)
                if on_event is not None:
                    on_event(pid, event)
        raise AssertionError(output)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


@pytest.fixture(scope='session')
def trainer():
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name('trainer.py'))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'},
    ) as process:
        yield Trainer(process)
