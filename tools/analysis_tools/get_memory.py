"""Measures the peak memory of a config's model: of one prediction, or of training steps with its optimizer.

The images are noise and the annotations made up; the model has new weights. Each figure is of a process of its own.
With --curve, predictions and training are measured at several sizes, a line is fitted to each, and all are drawn.
"""

from __future__ import annotations

import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import measuring
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmspatialmamba.engine.launch import LaunchError, find_scope, find_script, load_config
from mmspatialmamba.registry import type_name

SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}
RISE = 'MiB above it, peak'
SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
# Options of the backbone.
SERIES = {
    'inference': {},
    'training': {},
    'training, with_cp': dict(with_cp=True),
    'training, frozen_stages=2': dict(frozen_stages=2),
    'training, frozen_stages=2, with_cp': dict(frozen_stages=2, with_cp=True),
}


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config', help='the config; its default_scope names the library')
    shape = f'size of the images, which the paddings of the config become, too; default: {SHAPES}'
    parser.add_argument('--shape', type=positive, nargs=2, metavar=('H', 'W'), help=shape)
    parser.add_argument('--batch-size', type=positive, help="images; default: 1, with --training the config's")
    parser.add_argument('--training', action='store_true', help='measure two training steps, not a prediction')
    parser.add_argument('--curve', action='store_true', help="measure this package's backbone, batch size 1, at sizes")
    parser.add_argument('--sizes', type=positive, nargs='+', default=SIZES, help=f'sides for --curve; default: {SIZES}')
    limit = 'leave out sizes that need more memory, by what the one before took; default: %(default)s GiB'
    parser.add_argument('--limit', type=float, default=8, metavar='GIB', help=limit)
    measuring.add_device(parser)
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for figures and picture')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='changes')
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f'{text!r} is no positive integer')
    return int(text)


def prepare(args: Namespace) -> tuple[Config, str]:
    """Read the config and fit it to the image size; set arguments that it fills in; return it and its library."""
    cfg = load_config(args.config)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise LaunchError(f'--cfg-options do not fit config {args.config}: {error}') from error
    scope = find_scope(cfg)
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


def build(cfg: Config, scope: str, device: str) -> torch.nn.Module:
    """Build the model with new weights, and BN in place of SyncBN, which needs several processes."""
    init_default_scope(scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for module in model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and type_name(init_cfg['type']) in ('Pretrained', 'PretrainedInit'):
            module.init_cfg = None
    model.init_weights()
    return revert_sync_batchnorm(model).to(device)


def make_batch(model: torch.nn.Module, scope: str, channels: int, batch_size: int, shape: tuple[int, int]) -> dict:
    """Make a batch as the library's data loader does: uint8 noise, and annotations that the model can train with."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        masks, segments = model.data_preprocessor.pad_mask, model.data_preprocessor.pad_seg
        annotations = dict(num_items=[10] * batch_size, num_classes=5, with_mask=masks, with_semantic=segments)
        batch = demo_mm_inputs(batch_size, (channels, *shape), **annotations)
        things = next((m.num_things_classes for m in model.modules() if hasattr(m, 'num_things_classes')), 0)
        for sample in batch['data_samples']:
            sample.gt_instances.labels.zero_()
            if segments:
                sample.gt_sem_seg.sem_seg += things
        return batch
    images = [torch.randint(256, (channels, *shape), dtype=torch.uint8) for _ in range(batch_size)]
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return dict(inputs=images, data_samples=[DataSample(metainfo=info).set_gt_label(0) for _ in images])
    from mmseg.structures import SegDataSample

    classes = PixelData(data=torch.randint(min(model.num_classes, 5), (1, *shape)))
    return dict(inputs=images, data_samples=[SegDataSample(metainfo=info, gt_sem_seg=classes) for _ in images])


def measure(args: Namespace) -> dict:
    """Build the model, run it, and return figures.

    A prediction of an image of 256x256 goes ahead, for what is loaded at first use. From the second training step on
    the optimizer's state is there too.
    """
    MMLogger.get_instance('get_memory', log_level='ERROR')
    cfg, scope = prepare(args)
    model = build(cfg, scope, args.device).eval()
    channels = cfg.model.backbone.get('in_channels', 3)
    with torch.no_grad():
        model.test_step(make_batch(model, scope, channels, 1, (256, 256)))
    before = measuring.reset_peak_memory(args.device)
    batch = make_batch(model, scope, channels, args.batch_size, args.shape)
    wrapper, precision = cfg.get('optim_wrapper'), 'float32'
    if args.training and type_name(wrapper.get('type')) == 'AmpOptimWrapper':
        precision = 'mixed'
        if args.device == 'cpu':
            precision = "float32, not the config's mixed precision, which needs a GPU"
            wrapper = {key: value for key, value in wrapper.items() if key not in ('type', 'loss_scale', 'dtype')}
    optimizer = build_optim_wrapper(model.train(), wrapper) if args.training else None
    measuring.reset_peak_memory(args.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(args.training):
        for _ in range(2 if args.training else 1):
            model.train_step(batch, optimizer) if args.training else model.test_step(batch)
    if args.device == 'cuda':
        torch.cuda.synchronize()
    peak = measuring.peak_memory(args.device)
    return {
        'task': 'two training steps' if args.training else 'one prediction',
        'precision': precision,
        'device': measuring.device_name(args.device),
        'batch, channels, H, W': [args.batch_size, channels, *args.shape],
        'parameters': sum(p.numel() for p in model.parameters()),
        'trained parameters': sum(p.numel() for p in model.parameters() if p.requires_grad),
        'MiB, built model': round(before / measuring.MIB, 1),
        RISE: round((peak - before) / measuring.MIB, 1),
        'seconds': round(time.perf_counter() - start, 1),
    }


def measure_series(args: Namespace, series: str) -> dict[int, float]:
    """Measure the rise of memory, in MiB, at each size, up to the limit."""
    rises, before = {}, None
    options = {f'model.backbone.{key}': value for key, value in dict(SERIES[series], out_indices=(0, 1, 2, 3)).items()}
    case = dict(batch_size=1, training=series != 'inference', cfg_options={**options, **args.cfg_options})
    for size in sorted(set(args.sizes)):
        gib = rises[before] / 1024 * (size / before) ** 2 if before else 0
        if gib > args.limit:
            print(f'{series}: not at {size}x{size}, which would take {gib:.0f} GiB; the limit is {args.limit:.0f}')
            break
        figures = measuring.in_fresh_process(measure, Namespace(**{**vars(args), **case, 'shape': (size, size)}))
        rises[size], before = figures[RISE], size
        print(f'{series}: {size}x{size}: {rises[size]:.0f} MiB, {figures["seconds"]:.1f} s', flush=True)
    return rises


def fit(rises: dict[int, float]) -> dict[str, float]:
    """Fit memory, in MiB by side, as pixels^``exponent`` and as the straight line with the least relative errors."""
    pixels, mib = np.square(list(rises), dtype=float), np.array(list(rises.values()))
    slope, constant = np.polyfit(pixels, mib, 1, w=1 / mib)
    exponent, _ = np.polyfit(np.log(pixels), np.log(mib), 1)
    error = np.abs((slope * pixels + constant) / mib - 1).max()
    figures = dict(exponent=exponent, bytes_per_pixel=slope * measuring.MIB, constant_mib=constant, largest_error=error)
    return {key: round(float(value), 4) for key, value in figures.items()}


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
    axis.set_title(f'{record["config"]}, batch size 1, float32, {record["machine"]["device"]}', fontsize=9)
    axis.minorticks_off()
    axis.set_xticks(sides, [f'{side}²' for side in sides])
    axis.yaxis.set_major_formatter('{x:.0f} MiB')
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f'picture: {path}')


def curve(args: Namespace) -> dict:
    """Measure all series, fit and print them."""
    series = {name: measure_series(args, name) for name in SERIES}
    rows = [['image', *(f'{name}, MiB' for name in series)]]
    for size in sorted(set().union(*series.values())):
        rows.append([f'{size}x{size}', *(f'{rises[size]:.0f}' if size in rises else '' for rises in series.values())])
    print(measuring.table(rows))
    fits = {name: fit(rises) for name, rises in series.items() if len(rises) > 1 and min(rises.values()) > 0}
    for name in series:
        print(f'{name}: {fits.get(name, "no line fits: use more or larger sizes")}')
    return dict(config=Path(args.config).stem, series=series, fits=fits)


def main() -> int:
    args = parse_args()
    try:
        figures = curve(args) if args.curve else measuring.in_fresh_process(measure, args)
    except LaunchError as error:
        print(f'get_memory.py: {error}', file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not re.search("can't allocate memory|out of memory|terminated abruptly", str(error)):
            raise
        reason = str(error).splitlines()[0]
        print(f'get_memory.py: there is too little memory: use smaller images or batches ({reason})', file=sys.stderr)
        return 1
    if not args.curve:
        print(measuring.table([['figure', 'value'], *([key, str(value)] for key, value in figures.items())]))
    if args.out:
        record = dict(figures, machine=measuring.machine(args))
        path = measuring.write(args.out, 'memory', record)
        if args.curve:
            draw(record, path.with_suffix('.png'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
