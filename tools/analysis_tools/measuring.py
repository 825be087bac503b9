"""What the benchmarks share: timing in turn, peak memory, the record of the machine, and the JSON they write."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses between CPU and GPU."""
    cuda = torch.cuda.is_available()
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cuda' if cuda else 'cpu', help='default: %(default)s'
    )


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that both benchmarks have."""
    add_device(parser)
    parser.add_argument('--threads', type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument('--out', type=Path, default=Path(out), metavar='DIR', help='default: %(default)s')
    parser.add_argument('--seconds', type=float, help='time for each comparison; default: 20, on a GPU 1')
    parser.add_argument('--quick', action='store_true', help='small inputs and few runs, to see that it works')


def keep_freed_memory() -> bool:
    """Tell glibc to hand no freed memory back, so that large outputs do not fault in page after page at every call.

    Returns:
        bool: Whether the C library is glibc and did so.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def return_freed_memory() -> None:
    """Tell glibc to hand freed blocks of a MiB or more back at once, so that the resident memory is what is in use."""
    if platform.libc_ver()[0] == 'glibc':
        mallopt, mmap_threshold = ctypes.CDLL(None).mallopt, -3
        mallopt(mmap_threshold, 2**20)


def prepare(args: argparse.Namespace, for_time: bool = True) -> None:
    """Check the device, set threads and allocator, and fill in what depends on the device.

    Args:
        args (argparse.Namespace): The options.
        for_time (bool): Whether time is to be measured, for which freed memory is kept, and not the memory in use, for
            which it is returned. Defaults to True.

    Raises:
        SystemExit: If the device is not there.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('--device cuda: this PyTorch finds no GPU; use --device cpu')
    if args.threads:
        torch.set_num_threads(args.threads)
    args.keeps_freed_memory = for_time and keep_freed_memory()
    if not for_time:
        return_freed_memory()
    if args.seconds is None:
        args.seconds = 1.0 if args.device == 'cuda' else 20.0
    if args.quick:
        args.seconds = min(args.seconds, 0.3)
    args.out.mkdir(parents=True, exist_ok=True)


def _calls_a_sample(function: Callable, synchronize: Callable) -> tuple[int, float]:
    """Warm ``function`` up; the number of calls that take a millisecond, and the seconds of one call."""
    function()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    seconds = max(time.perf_counter() - start, 1e-6)
    calls = min(100, math.ceil(1e-3 / seconds))
    for _ in range(calls):
        function()
    synchronize()
    return calls, seconds


def measure(functions: dict[str, Callable], device: str, seconds: float, rounds: Sequence[int] = (5, 100)) -> dict:
    """Time functions in turn, one sample of each a round, so that noise of the machine meets them all alike.

    Args:
        functions (dict[str, Callable]): What to time, by name.
        device (str): 'cpu' or 'cuda'. On a GPU a sample lies between two events on the current stream.
        seconds (float): About how long to measure.
        rounds (Sequence[int]): The least and the most rounds. Defaults to (5, 100).

    Returns:
        dict[str, ndarray]: Milliseconds of a call, one for each round.
    """
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    calls, cost = {}, 0.0
    for name, function in functions.items():
        calls[name], one = _calls_a_sample(function, synchronize)
        cost += calls[name] * one
    samples = {name: [] for name in functions}
    for _ in range(int(np.clip(seconds / cost, *rounds))):
        for name, function in functions.items():
            if device == 'cuda':
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                synchronize()
                start.record()
                for _ in range(calls[name]):
                    function()
                end.record()
                synchronize()
                milliseconds = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                for _ in range(calls[name]):
                    function()
                milliseconds = (time.perf_counter() - begin) * 1e3
            samples[name].append(milliseconds / calls[name])
    return {name: np.array(values) for name, values in samples.items()}


def reset_peak_memory(device: str) -> int:
    """Set the peak that :func:`peak_memory` tells back to the present.

    Args:
        device (str): 'cpu' or 'cuda'.

    Returns:
        int: Bytes in use at present: on a GPU what PyTorch allocated, on the CPU the process's resident memory.
    """
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # 5 sets the peak, VmHWM, back.
    Path('/proc/self/clear_refs').write_text('5')
    return _resident('VmRSS')


def peak_memory(device: str) -> int:
    """The most bytes in use since :func:`reset_peak_memory`, counted as there."""
    return torch.cuda.max_memory_allocated() if device == 'cuda' else _resident('VmHWM')


def _resident(key: str) -> int:
    return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {'median': float(median), 'q25': float(low), 'q75': float(high)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor()


def machine(args: argparse.Namespace) -> dict:
    """What the figures depend on beside the code."""
    packages = ('torch', 'triton', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'torchvision')
    record = {
        'device': device_name(args.device),
        'cpu': _cpu_name(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'keeps_freed_memory': args.keeps_freed_memory,
        'load_average_at_start': os.getloadavg()[0],
        'system': platform.platform(),
        'python': platform.python_version(),
        'versions': {package: version for package in packages if (version := _version(package))},
        'cuda': torch.version.cuda if args.device == 'cuda' else None,
        'tf32_matmul': torch.backends.cuda.matmul.allow_tf32,
        'tf32_convolutions': torch.backends.cudnn.allow_tf32,
    }
    if args.device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        record['gpu_memory_gib'] = round(properties.total_memory / 2**30, 1)
        record['gpu_multiprocessors'] = properties.multi_processor_count
    return record


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(0) if device == 'cuda' else _cpu_name()


def write(args: argparse.Namespace, stem: str, record: dict, draw: Callable) -> None:
    """Write ``STEM_DEVICE.json`` and, where matplotlib is there, a picture beside it.

    Args:
        args (argparse.Namespace): The options; ``out`` is the folder.
        stem (str): First part of the files' names.
        record (dict): What to write.
        draw (Callable): Draws ``record`` on the figure it is given.
    """
    path = args.out / f'{stem}_{re.sub(r"[^A-Za-z0-9]+", "-", device_name(args.device)).strip("-")}.json'
    path.write_text(json.dumps(record, indent=1) + '\n')
    print(f'figures: {path}')
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed ("pip install matplotlib")')
        return
    figure = Figure(figsize=(10, 5), layout='constrained')
    draw(figure, record)
    figure.savefig(path.with_suffix('.png'), dpi=120)
    print(f'picture: {path.with_suffix(".png")}')


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text with columns aligned, the first row above a rule."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])
