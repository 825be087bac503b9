"""Measures how the backbone's peak memory grows with the image, in inference and training, and draws it.

Each figure is get_memory.py's, of a classifier that computes all four outputs of the backbone, at batch size 1, in a
process of its own. A size that would take more memory than there is, by what the one before it took, is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import add_device, machine, table, write

TOOLS = Path(__file__).parent
CONFIG = TOOLS.parents[1] / 'configs' / 'classification' / 'spatialmamba-tiny_8xb128_in1k.py'
SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
TRAINING_SIZES = SIZES[:5]
INFERENCE = 'inference'
SERIES = {
    INFERENCE: {},
    'training': {},
    'training, with_cp': dict(with_cp=True),
    'training, frozen_stages=2': dict(frozen_stages=2),
    'training, frozen_stages=2, with_cp': dict(frozen_stages=2, with_cp=True),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(CONFIG), help="a classifier's config; default: %(default)s")
    for option, sizes in (('--sizes', SIZES), ('--training-sizes', TRAINING_SIZES)):
        sides = f'sides of the images; default: {" ".join(map(str, sizes))}'
        parser.add_argument(option, type=int, nargs='+', default=sizes, metavar='SIDE', help=sides)
    add_device(parser)
    parser.add_argument(
        '--limit', type=float, metavar='GIB', help='memory to use at most; default: 9 tenths of the free'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/memory'), metavar='DIR', help='default: %(default)s'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='config changes')
    args = parser.parse_args()
    for option, sizes in (('--sizes', args.sizes), ('--training-sizes', args.training_sizes)):
        if len(set(sizes)) < 2 or min(sizes) < 1:
            parser.error(f'{option} needs two different positive sizes, or more')
    if args.limit is None:
        args.limit = 0.9 * free_memory(args.device) / 2**30
    args.out.mkdir(parents=True, exist_ok=True)
    args.keeps_freed_memory = False
    return args


def free_memory(device: str) -> int:
    """Bytes of memory that nothing uses."""
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0]
    return int(re.search(r'MemAvailable:\s+(\d+)', Path('/proc/meminfo').read_text())[1]) * 1024


def measure(args: argparse.Namespace, series: str, size: int) -> dict:
    """The figures of get_memory.py.

    Args:
        args (Namespace): The arguments.
        series (str): One of ``SERIES``.
        size (int): Side of the image.

    Returns:
        dict: The figures.

    Raises:
        SystemExit: If it fails.
    """
    options = [f'model.backbone.{key}={value}' for key, value in SERIES[series].items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, 'figures.json')
        command = [sys.executable, str(TOOLS / 'get_memory.py'), args.config, '--device', args.device]
        command += ['--batch-size', '1', '--shape', str(size), str(size), '--out', str(out)]
        command += [] if series == INFERENCE else ['--training']
        command += ['--cfg-options', 'model.backbone.out_indices=0,1,2,3', *options, *args.cfg_options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f'memory_curve.py: {series} at {size}x{size} failed:\n{result.stderr}')
        return json.loads(out.read_text())


def measure_series(args: argparse.Namespace, series: str) -> dict[int, dict]:
    """The figures at each size, up to that which would exceed the limit."""
    figures, before = {}, None
    for size in sorted(set(args.sizes if series == INFERENCE else args.training_sizes)):
        if before is not None:
            gib = figures[before]['rise_mib'] / 1024 * (size / before) ** 2
            if gib > args.limit:
                print(f'{series}: not at {size}x{size}, which would take {gib:.0f} GiB; the limit is {args.limit:.0f}')
                break
        figures[size], before = measure(args, series, size), size
        mib, seconds = figures[size]['rise_mib'], figures[size]['seconds']
        print(f'{series}: {size}x{size}: {mib:.0f} MiB, {seconds:.1f} s', flush=True)
    return figures


def fit(figures: dict[int, dict]) -> dict[str, float]:
    """How memory grows with pixels.

    Args:
        figures (dict[int, dict]): The figures of two sizes or more, by side.

    Returns:
        dict[str, float]: ``exponent`` p of memory ~ pixels^p, fitted to logarithms; ``bytes_per_pixel`` and
        ``constant_mib`` of the straight line with the least relative errors, and the ``largest_error`` of these.
    """
    pixels = np.array([size**2 for size in figures], dtype=float)
    mib = np.array([one['rise_mib'] for one in figures.values()])
    slope, constant = np.polyfit(pixels, mib, 1, w=1 / mib)
    error = np.abs((slope * pixels + constant) / mib - 1).max()
    return dict(
        exponent=float(np.polyfit(np.log(pixels), np.log(mib), 1)[0]),
        bytes_per_pixel=float(slope * 2**20),
        constant_mib=float(constant),
        largest_error=float(error),
    )


def draw(figure, record: dict) -> None:
    figure.set_size_inches(7, 5)
    axis = figure.subplots()
    for (series, figures), marker in zip(record['series'].items(), 'osD^v'):
        sides = [int(size) for size in figures]
        mib = [one['rise_mib'] for one in figures.values()]
        slope = f': {record["fits"][series]["bytes_per_pixel"]:.0f} bytes a pixel' if series in record['fits'] else ''
        axis.plot(sides, mib, marker=marker, markersize=4, linewidth=1.2, label=series + slope)
    first = next(iter(record['series'].values()))
    sides = [int(size) for size in first]
    start = next(iter(first.values()))['rise_mib'] / 2
    line = [start * (side / sides[0]) ** 2 for side in sides]
    axis.plot(sides, line, color='grey', linestyle='--', linewidth=1, label='proportional to pixels')
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.set_xticks(sides, [f'{side}²' for side in sides])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = [2**i for i in range(24) if low < 2**i < high]
    axis.set_yticks(ticks, [f'{tick} MiB' if tick < 1024 else f'{tick // 1024} GiB' for tick in ticks])
    axis.grid(linewidth=0.3)
    axis.set_xlabel('image, pixels')
    axis.set_ylabel('peak memory above the model')
    axis.legend(fontsize=8)
    axis.set_title(f'SpatialMamba-T, batch size 1, float32, {record["machine"]["device"]}', fontsize=9)


def main() -> None:
    args = parse_args()
    record = dict(machine=machine(args), options={k: str(v) for k, v in vars(args).items()}, series={}, fits={})
    for series in SERIES:
        figures = measure_series(args, series)
        record['series'][series] = figures
        still = [f'{size}x{size}' for size, one in figures.items() if one['rise_mib'] <= 0]
        if still:
            print(f'{series}: memory did not rise at {", ".join(still)}, so no line is fitted: use larger sizes')
        elif len(figures) > 1:
            record['fits'][series] = fit(figures)
    names = list(SERIES)
    rows = [['image', *(f'{name}, MiB' for name in names)]]
    for size in sorted({*args.sizes, *args.training_sizes}):
        cells = [record['series'][name].get(size) for name in names]
        rows.append([f'{size}x{size}', *(f'{cell["rise_mib"]:.0f}' if cell else '' for cell in cells)])
    print(table(rows))
    for name, one in record['fits'].items():
        print(
            f'{name}: memory ~ pixels^{one["exponent"]:.3f}; {one["bytes_per_pixel"]:.0f} bytes a pixel and '
            f'{one["constant_mib"]:.0f} MiB, to within {100 * one["largest_error"]:.1f} %'
        )
    write(args, 'memory', record, draw)


if __name__ == '__main__':
    main()
