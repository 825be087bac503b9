"""Measures the peak memory of a config's model: of one prediction, or of training steps with its optimizer.

The images are noise and the annotations made up; the model has new weights. Each figure is of a process of its own.
With --curve, predictions and training are measured at several sizes, a line is fitted to each, and all are drawn.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from argparse import Namespace
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import measuring
import numpy as np
import torch
from measuring import MIB
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

import mmspatialmamba  # noqa: F401
from mmspatialmamba.engine.launch import LaunchError, find_script, load_config

SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}
WARM_UP_SHAPE = (256, 256)
NUM_INSTANCES = 10
NUM_STUFF = 5
SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
# Training, and options of the backbone.
SERIES = {
    'inference': (False, {}),
    'training': (True, {}),
    'training, with_cp': (True, {'with_cp': True}),
    'training, frozen_stages=2': (True, {'frozen_stages': 2}),
    'training, frozen_stages=2, with_cp': (True, {'frozen_stages': 2, 'with_cp': True}),
}


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='the config; its default_scope names the library')
    shapes = ', '.join(f'{scope} {height} {width}' for scope, (height, width) in SHAPES.items())
    shape = f'size of the images, which the paddings of the config become, too; default: {shapes}'
    parser.add_argument('--shape', type=positive, nargs=2, metavar=('H', 'W'), help=shape)
    batch_size = "images at a time; default: 1, with --training the config's on one device"
    parser.add_argument('--batch-size', type=positive, help=batch_size)
    parser.add_argument('--training', action='store_true', help='measure two training steps, not a prediction')
    curve = 'measure a backbone of this package with all outputs, at batch size 1 and the sizes'
    parser.add_argument('--curve', action='store_true', help=curve)
    sizes = f'sides of the images for --curve; default: {" ".join(map(str, SIZES))}'
    parser.add_argument('--sizes', type=positive, nargs='+', default=SIZES, metavar='SIDE', help=sizes)
    limit = 'leave out sizes that need more memory, by what the one before took; default: 9 tenths of the free'
    parser.add_argument('--limit', type=float, metavar='GIB', help=limit)
    measuring.add_device(parser)
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for figures and picture')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='changes')
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no positive integer')
    return int(text)


def prepare(args: Namespace) -> tuple[Config, str]:
    """Read the config and fit it to the image size; set the arguments that it fills in, and return it and its library.

    Raises:
        LaunchError: If the config cannot be read or changed so, or is for no installed library.
    """
    cfg = load_config(args.config)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise LaunchError(f'--cfg-options do not fit config {args.config}: {error}') from error
    scope = cfg.get('default_scope')
    find_script(scope, 'train', args.config)
    args.shape = tuple(args.shape or SHAPES[scope])
    args.batch_size = args.batch_size or (cfg.train_dataloader.batch_size if args.training else 1)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    preprocessor = cfg.model.get('data_preprocessor') or {}
    for padding in (preprocessor, *(preprocessor.get('batch_augments') or ())):
        if 'size' in padding:
            padding['size'] = args.shape
    return cfg, scope


def build(cfg: Config, scope: str, device: str) -> nn.Module:
    """Build the model with new weights, and BN in place of SyncBN, which needs several processes."""
    init_default_scope(scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for module in model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg['type'] == 'Pretrained':
            module.init_cfg = None
    model.init_weights()
    return revert_sync_batchnorm(model).to(device)


def make_batch(model: nn.Module, scope: str, channels: int, batch_size: int, shape: tuple[int, int]) -> dict:
    """Make a batch as the library's data loader gives it: uint8 noise, and annotations that the model can train with."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        options = dict(num_items=[NUM_INSTANCES] * batch_size, num_classes=NUM_STUFF)
        options |= dict(with_mask=model.data_preprocessor.pad_mask, with_semantic=model.data_preprocessor.pad_seg)
        batch = demo_mm_inputs(batch_size, (channels, *shape), **options)
        things = next((m.num_things_classes for m in model.modules() if hasattr(m, 'num_things_classes')), 0)
        for sample in batch['data_samples']:
            sample.gt_instances.labels.zero_()
            if model.data_preprocessor.pad_seg:
                sample.gt_sem_seg.sem_seg += things
        return batch
    images = [torch.randint(256, (channels, *shape), dtype=torch.uint8) for _ in range(batch_size)]
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return dict(inputs=images, data_samples=[DataSample(metainfo=info).set_gt_label(0) for _ in images])
    from mmseg.structures import SegDataSample

    classes = PixelData(data=torch.randint(min(model.num_classes, NUM_STUFF), (1, *shape)))
    return dict(inputs=images, data_samples=[SegDataSample(metainfo=info, gt_sem_seg=classes) for _ in images])


def measure(args: Namespace) -> dict:
    """Build the model, run it, and return figures; memory in MiB.

    A prediction of an image of 256x256 goes ahead, for what is loaded at first use. From the second training step on
    the optimizer's state is there too.
    """
    MMLogger.get_instance('get_memory', log_level='WARNING')
    cfg, scope = prepare(args)
    model = build(cfg, scope, args.device).eval()
    channels = cfg.model.backbone.get('in_channels', 3)
    with torch.no_grad():
        model.test_step(make_batch(model, scope, channels, 1, WARM_UP_SHAPE))
    before = measuring.reset_peak_memory(args.device)
    batch = make_batch(model, scope, channels, args.batch_size, args.shape)
    precision = 'float32'
    if args.training:
        wrapper = cfg.optim_wrapper
        if wrapper.get('type') == 'AmpOptimWrapper':
            precision = 'mixed precision'
            if args.device == 'cpu':
                precision = "float32, not the config's mixed precision, which needs a GPU"
                kept = {key: value for key, value in wrapper.items() if key not in ('loss_scale', 'dtype')}
                wrapper = dict(kept, type='OptimWrapper')
        optimizer = build_optim_wrapper(model.train(), wrapper)
    measuring.reset_peak_memory(args.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(args.training):
        for _ in range(2 if args.training else 1):
            model.train_step(batch, optimizer) if args.training else model.test_step(batch)
    if args.device == 'cuda':
        torch.cuda.synchronize()
    peak = measuring.peak_memory(args.device)
    return dict(
        config=args.config,
        task='two training steps' if args.training else 'one prediction',
        input=[args.batch_size, channels, *args.shape],
        device=measuring.device_name(args.device),
        precision=precision,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=time.perf_counter() - start,
        before_mib=before / MIB,
        rise_mib=(peak - before) / MIB,
    )


def report(figures: dict) -> str:
    """Format the figures in aligned lines."""
    total, trained = figures['parameters'] / 1e6, figures['trained_parameters'] / 1e6
    lines = {
        'config': figures['config'],
        'measured': f'{figures["task"]}, {figures["precision"]}, on {figures["device"]}',
        'input': f'{" x ".join(map(str, figures["input"]))} (batch, channels, H, W)',
        'parameters': f'{total:.3f} M, {trained:.3f} M of them trained',
        'peak memory': f'{figures["rise_mib"]:.0f} MiB above the {figures["before_mib"]:.0f} MiB of the built model',
        'time': f'{figures["seconds"]:.1f} s',
    }
    return '\n'.join(f'{key + ":":<12} {value}' for key, value in lines.items())


def free_gib(device: str) -> float:
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0] / 2**30
    return int(re.search(r'MemAvailable:\s+(\d+)', Path('/proc/meminfo').read_text())[1]) / 2**20


def measure_series(args: Namespace, series: str) -> dict[int, float]:
    """Measure the rise of memory, in MiB, at each size, up to the limit."""
    rises, before = {}, None
    training, options = SERIES[series]
    options = {f'model.backbone.{key}': value for key, value in dict(options, out_indices=(0, 1, 2, 3)).items()}
    case = dict(batch_size=1, training=training, cfg_options={**options, **args.cfg_options})
    for size in sorted(set(args.sizes)):
        gib = rises[before] / 1024 * (size / before) ** 2 if before else 0
        if gib > args.limit:
            print(f'{series}: not at {size}x{size}, which would take {gib:.0f} GiB; the limit is {args.limit:.0f}')
            break
        figures = measuring.in_fresh_process(measure, Namespace(**{**vars(args), **case, 'shape': (size, size)}))
        rises[size], before = figures['rise_mib'], size
        print(f'{series}: {size}x{size}: {rises[size]:.0f} MiB, {figures["seconds"]:.1f} s', flush=True)
    return rises


def fit(rises: dict[int, float]) -> dict[str, float]:
    """Fit how memory, in MiB by side, grows with pixels.

    The result holds the ``exponent`` p of memory ~ pixels^p, fitted to logarithms, ``bytes_per_pixel`` and
    ``constant_mib`` of the straight line with the least relative errors, and the ``largest_error`` of these.
    """
    pixels, mib = np.square(list(rises), dtype=float), np.array(list(rises.values()))
    slope, constant = np.polyfit(pixels, mib, 1, w=1 / mib)
    exponent, _ = np.polyfit(np.log(pixels), np.log(mib), 1)
    error = np.abs((slope * pixels + constant) / mib - 1).max()
    names = ('exponent', 'bytes_per_pixel', 'constant_mib', 'largest_error')
    return dict(zip(names, map(float, (exponent, slope * MIB, constant, error))))


def draw(record: dict, path: Path) -> None:
    """Draw the curves over the size, both logarithmic, and a line proportional to the pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout='constrained')
    axis = figure.subplots()
    for (series, rises), marker in zip(record['series'].items(), 'osD^v'):
        slope = f': {record["fits"][series]["bytes_per_pixel"]:.0f} bytes a pixel' if series in record['fits'] else ''
        axis.plot(rises.keys(), rises.values(), marker=marker, markersize=4, linewidth=1.2, label=series + slope)
    rises = next(iter(record['series'].values()))
    sides, first = np.array(list(rises)), next(iter(rises.values()))
    axis.plot(sides, first / 2 * (sides / sides[0]) ** 2, color='grey', linestyle='--', label='proportional to pixels')
    axis.set(xscale='log', yscale='log', xlabel='image, pixels', ylabel='peak memory above the model')
    axis.minorticks_off()
    axis.set_xticks(sides, [f'{side}²' for side in sides])
    ticks = [2**i for i in range(24) if axis.get_ylim()[0] < 2**i < axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f'{tick} MiB' if tick < 1024 else f'{tick // 1024} GiB' for tick in ticks])
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    name = Path(record['machine']['options']['config']).stem
    axis.set_title(f'{name}, batch size 1, float32, {record["machine"]["device"]}', fontsize=9)
    figure.savefig(path, dpi=120)
    print(f'picture: {path}')


def curve(args: Namespace) -> dict:
    """Measure all series, fit and print them."""
    args.limit = args.limit or 0.9 * free_gib(args.device)
    series = {name: measure_series(args, name) for name in SERIES}
    sizes = sorted(set().union(*series.values()))
    rows = [
        [f'{size}x{size}', *(f'{rises[size]:.0f}' if size in rises else '' for rises in series.values())]
        for size in sizes
    ]
    print(measuring.table([['image', *(f'{name}, MiB' for name in series)], *rows]))
    fits = {name: fit(rises) for name, rises in series.items() if len(rises) > 1 and min(rises.values()) > 0}
    for name, one in fits.items():
        print(
            f'{name}: memory ~ pixels^{one["exponent"]:.3f}; {one["bytes_per_pixel"]:.0f} bytes a pixel and '
            f'{one["constant_mib"]:.0f} MiB, to within {100 * one["largest_error"]:.1f} %'
        )
    return dict(series=series, fits=fits)


def main() -> int:
    args = parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    record = dict(machine=measuring.machine(args))
    try:
        if args.curve:
            record |= curve(args)
        else:
            record |= measuring.in_fresh_process(measure, args)
            print(report(record))
    except LaunchError as error:
        print(f'get_memory.py: {error}', file=sys.stderr)
        return 2
    except (BrokenProcessPool, RuntimeError) as error:
        killed = isinstance(error, (BrokenProcessPool, torch.OutOfMemoryError))
        if not killed and "can't allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(f'get_memory.py: there is too little memory: use smaller images or batches ({reason})', file=sys.stderr)
        return 1
    if args.out:
        path = measuring.write(args.out, 'memory', record)
        if args.curve:
            draw(record, path.with_suffix('.png'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
