"""What the tests that start the tools in processes of their own share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


def cpu_environment(**env: object) -> dict[str, str]:
    """The environment of a process that sees no GPU, has one thread and is of no process group, and ``env``."""
    kept = {k: v for k, v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    kept.update(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PYTHON=sys.executable)
    return {**kept, **{key: str(value) for key, value in env.items()}}


def run_script(*args: object, cwd: Path, **env: object) -> subprocess.CompletedProcess:
    """Run a command in ``cpu_environment(**env)``."""
    return subprocess.run(list(map(str, args)), cwd=cwd, capture_output=True, text=True, env=cpu_environment(**env))


def check_stderr(text: str) -> None:
    """Check what several processes that went well wrote to stderr.

    torch's launchers wait for each other at the end through a store which the first machine's keeps: it may be gone
    before another's has heard that all are done. That one logs it, with a traceback, and ends as it should.
    """
    assert text.count('Traceback') == text.count('Error waiting on exit barrier'), text
    assert 'destroy_process_group' not in text


def dist_train(config: Path, work_dir: Path, *args: object, nodes: int = 1, processes: int = 2, **env: object) -> str:
    """Train with tools/dist_train.sh, once for each of the ``nodes``; return what the first printed."""
    command = (TOOLS / 'dist_train.sh', config, processes, '--work-dir', work_dir, *args)
    env.update(NNODES=nodes, PORT=get_free_port())
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(run_script, *command, cwd=config.parent, NODE_RANK=i, **env) for i in range(nodes)]
    results = [node.result() for node in started]
    for result in results:
        assert result.returncode == 0, result.stderr
        check_stderr(result.stderr)
    return results[0].stdout


def write_images(folder: Path, classes: Sequence[int]) -> None:
    """Write an image of noise for each of the ``classes``, in a sub-folder for each class."""
    generator = np.random.default_rng(0)
    for index, number in enumerate(classes):
        path = folder / f'class{number}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
