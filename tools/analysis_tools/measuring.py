"""Shared parts of the measuring tools: interleaved timing, memory, the record of the machine, tables."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import timeit
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from multiprocessing import get_context
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch

FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
PACKAGES = ('torch', 'triton', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'torchvision')
MIB = 2**20


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses between CPU and, where PyTorch finds one, GPU."""
    devices = ['cuda', 'cpu'] if torch.cuda.is_available() else ['cpu']
    parser.add_argument('--device', choices=devices, default=devices[0], help='default: %(default)s')


def parse_benchmark_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options that both benchmarks have, parse all, and set threads and allocator."""
    add_device(parser)
    parser.add_argument('--threads', type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument('--out', type=Path, default='work_dirs/benchmark', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--seconds', type=float, help='time for each comparison; default: 20, on a GPU 1')
    parser.add_argument('--quick', action='store_true', help='small inputs and few rounds, to see that it works')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.seconds = args.seconds or (0.3 if args.quick else 1.0 if args.device == 'cuda' else 20.0)
    args.keeps_freed_memory = tune_malloc(keep_freed_memory=True)
    return args


def tune_malloc(keep_freed_memory: bool) -> bool:
    """Make glibc keep freed memory, for timing without page faults, or return it, so that resident memory is in use.

    Returns:
        bool: Whether the C library is glibc and did so.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    options = {mmap_max: 0, trim_threshold: 2**31 - 1} if keep_freed_memory else {mmap_threshold: MIB}
    return all(map(ctypes.CDLL(None).mallopt, options.keys(), options.values()))


def measure(functions: dict, seconds: float, rounds: Sequence[int] = (5, 100)) -> dict:
    """Time functions in turn, one sample of each a round, so that noise of the machine hits them all alike.

    A sample is as many calls as take a millisecond; a GPU is synchronized around it. There are as many rounds as fit
    into ``seconds``, within the limits. The result holds milliseconds of a call by name, one for each round.
    """
    # Imported here because it warns where CUDA is installed without a GPU, and processes that measure memory need none.
    from torch.utils import benchmark

    calls, clocks, cost = {}, {}, 0.0
    for name, function in functions.items():
        function()
        timer = benchmark.Timer('f()', globals={'f': function}, num_threads=torch.get_num_threads())
        trial = timer.blocked_autorange(min_run_time=1e-3)
        calls[name] = trial.number_per_run
        cost += calls[name] * trial.median
        # benchmark.Timer would warm up again, by two calls, before each sample.
        clocks[name] = timeit.Timer(function, timer=benchmark.timer)
    samples = {name: [] for name in functions}
    for _ in range(int(np.clip(seconds / cost, *rounds))):
        for name, clock in clocks.items():
            samples[name].append(1e3 * clock.timeit(calls[name]) / calls[name])
    return {name: np.array(values) for name, values in samples.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Compute median and quartiles."""
    return dict(zip(('q25', 'median', 'q75'), np.percentile(values, [25, 50, 75]).tolist()))


def kept_bytes(forward: Callable, parameters: Iterable[torch.Tensor] = ()) -> int:
    """Sum the storages, in bytes, that autograd keeps from a forward pass for its backward pass, each once.

    ``forward`` returns the outputs; storages of ``parameters`` are not counted.
    """
    kept = WeakSet()  # weak, so that what a checkpoint drops again is not counted

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(held := tensor.detach())
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
        outputs = forward()  # holds the graph
    sizes = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in kept}
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del outputs
    return sum(sizes.values())


def reset_peak_memory(device: str) -> int:
    """Reset the peak of :func:`peak_memory`; return the bytes in use at present.

    On a GPU ('cuda') they are what PyTorch allocated, on the CPU ('cpu') the process's resident memory.
    """
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    return _resident('VmRSS')


def peak_memory(device: str) -> int:
    """Return the most bytes in use since :func:`reset_peak_memory`, counted as there."""
    return torch.cuda.max_memory_allocated() if device == 'cuda' else _resident('VmHWM')


def _resident(key: str) -> int:
    return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def in_fresh_process(function: Callable, *args):
    """Call a module's function in a new process, which holds nothing else and returns freed memory at once.

    What the function raises is raised here; a process that is killed raises ``BrokenProcessPool``.
    """
    with ProcessPoolExecutor(1, get_context('spawn'), _start, [torch.get_num_threads()]) as pool:
        return pool.submit(function, *args).result()


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    tune_malloc(keep_freed_memory=False)


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device == 'cuda':
        return torch.cuda.get_device_name(0)
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor()


def machine(args: argparse.Namespace) -> dict:
    """Record what the figures depend on besides the code; ``args`` are the options."""
    return {
        'device': device_name(args.device),
        'cpu': device_name('cpu'),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load_average_at_start': os.getloadavg()[0],
        'system': platform.platform(),
        'python': platform.python_version(),
        'versions': {one.name: one.version for one in distributions() if one.name in PACKAGES},
        'cuda': torch.version.cuda,
        'tf32': {'matmul': torch.backends.cuda.matmul.allow_tf32, 'cudnn': torch.backends.cudnn.allow_tf32},
        'options': {key: str(value) for key, value in vars(args).items()},
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of rows of text; a rule follows the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def write(out: Path, stem: str, record: dict) -> Path:
    """Write ``STEM_DEVICE.json`` into the folder ``out``; return its path."""
    device = re.sub('[^A-Za-z0-9]+', '-', record['machine']['device']).strip('-')
    path = out / f'{stem}_{device}.json'
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + '\n')
    print(f'figures: {path}')
    return path
