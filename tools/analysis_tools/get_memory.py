"""Measures the peak memory of a config's model: of one prediction, or of training steps with its optimizer.

The images are noise and the annotations made up; the model is a new one, as before its first training step, without
pretrained weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from measuring import add_device, device_name, peak_memory, reset_peak_memory, return_freed_memory
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

import mmspatialmamba  # noqa: F401
from mmspatialmamba.engine.launch import CONFIG_ERRORS, LaunchError, find_script, load_config

SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 512), 'mmpretrain': (224, 224)}
WARM_UP_SHAPE = (256, 256)
NUM_INSTANCES = 10
NUM_STUFF = 5
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='the config; its default_scope names the library')
    shapes = ', '.join(f'{scope} {height} {width}' for scope, (height, width) in SHAPES.items())
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help=f'size of the images; a size that the config pads training images to becomes this one; default: {shapes}',
    )
    parser.add_argument(
        '--batch-size', type=int, help="images at a time; default: 1, with --training the config's on one device"
    )
    parser.add_argument('--training', action='store_true', help='measure two training steps, not a prediction')
    add_device(parser)
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the figures to this JSON file too')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='changes to the config'
    )
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: this PyTorch finds no GPU; use --device cpu')
    for name, values in (('--shape', args.shape), ('--batch-size', args.batch_size and [args.batch_size])):
        if values and min(values) < 1:
            parser.error(f'{name} must be positive, but is {" ".join(map(str, values))}')
    return args


def prepare(args: argparse.Namespace) -> tuple[Config, str]:
    """Read the config, fill in what the arguments leave to it, and fit it to the image size.

    Args:
        args (Namespace): The arguments; ``shape`` and ``batch_size`` are set.

    Returns:
        tuple[Config, str]: The config and its library.

    Raises:
        LaunchError: If the config cannot be read or changed so, or is for no installed library.
    """
    cfg = load_config(args.config)
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except CONFIG_ERRORS as error:
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


def build_optimizer(model: nn.Module, cfg: Config, device: str):
    """Build the optimizer wrapper of the config, on the CPU that of plain float32 in place of mixed precision."""
    wrapper = cfg.optim_wrapper.copy()
    if device == 'cpu' and wrapper.get('type') == 'AmpOptimWrapper':
        wrapper['type'] = 'OptimWrapper'
        for key in ('loss_scale', 'dtype'):
            wrapper.pop(key, None)
    return build_optim_wrapper(model, wrapper)


def stuff_map(num_classes: int, shape: tuple[int, int], first: int = 0) -> PixelData:
    """A map of up to five classes, in bands one above the other."""
    height, width = shape
    bands = first + torch.arange(height) * min(num_classes, NUM_STUFF) // height
    return PixelData(data=bands[None, :, None].repeat(1, 1, width))


def detection_sample(model: nn.Module, shape: tuple[int, int]):
    """Ten instances, and what the preprocessor pads of masks and semantic map, which are what the model needs."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = shape
    # Sorted coordinates of two points: left and top, right and bottom.
    boxes = (torch.rand(NUM_INSTANCES, 2, 2).sort(dim=1).values * torch.tensor([width, height])).flatten(1)
    sample = DetDataSample(metainfo=dict(img_id=0, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(NUM_INSTANCES, dtype=torch.long))
    if model.data_preprocessor.pad_mask:
        masks = torch.zeros(NUM_INSTANCES, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long()):
            mask[top : bottom + 1, left : right + 1] = 1
        sample.gt_instances.masks = BitmapMasks(masks.numpy(), height, width)
    if model.data_preprocessor.pad_seg:
        things = next((m.num_things_classes for m in model.modules() if hasattr(m, 'num_things_classes')), 0)
        sample.gt_sem_seg = PixelData(sem_seg=stuff_map(NUM_STUFF, shape, things).data)
    return sample


def segmentation_sample(model: nn.Module, shape: tuple[int, int]):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
    sample.gt_sem_seg = stuff_map(model.num_classes, shape)
    return sample


def classification_sample(model: nn.Module, shape: tuple[int, int]):
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=dict(img_shape=shape, ori_shape=shape)).set_gt_label(0)


SAMPLES = {'mmdet': detection_sample, 'mmseg': segmentation_sample, 'mmpretrain': classification_sample}


def make_batch(model: nn.Module, scope: str, channels: int, batch_size: int, shape: tuple[int, int]) -> dict:
    """A batch as the library's data loader gives it: noise, (channels, H, W), uint8, and an annotation for each image.

    Args:
        model (nn.Module): The model; its annotations are what it can be trained with.
        scope (str): Its library.
        channels (int): Number of image channels.
        batch_size (int): Number of images.
        shape (tuple[int, int]): H and W.

    Returns:
        dict: ``inputs`` and ``data_samples``, lists.
    """
    images = [torch.randint(256, (channels, *shape), dtype=torch.uint8) for _ in range(batch_size)]
    return dict(inputs=images, data_samples=[SAMPLES[scope](model, shape) for _ in range(batch_size)])


def measure(args: argparse.Namespace) -> dict:
    """Build the model, run it, and take the peak memory.

    A prediction of an image of 256x256 goes ahead, for what is loaded at first use. From the second training step on
    the optimizer's state is there too.

    Args:
        args (Namespace): The arguments.

    Returns:
        dict: The figures; memory in MiB.

    Raises:
        LaunchError: If the config cannot be read, or is for no installed library.
    """
    cfg, scope = prepare(args)
    model = build(cfg, scope, args.device).eval()
    channels = cfg.model.backbone.get('in_channels', 3)
    with torch.no_grad():
        model.test_step(make_batch(model, scope, channels, 1, WARM_UP_SHAPE))
    before = reset_peak_memory(args.device)
    batch = make_batch(model, scope, channels, args.batch_size, args.shape)
    precision, optimizer = 'float32', None
    if args.training:
        model.train()
        optimizer = build_optimizer(model, cfg, args.device)
        if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
            in_float32 = "float32, not the config's mixed precision, which needs a GPU"
            precision = in_float32 if args.device == 'cpu' else 'mixed precision'
    reset_peak_memory(args.device)
    start = time.perf_counter()
    if args.training:
        for _ in range(2):
            model.train_step(batch, optimizer)
    else:
        with torch.no_grad():
            model.test_step(batch)
    if args.device == 'cuda':
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = peak_memory(args.device)
    return dict(
        config=args.config,
        cfg_options=args.cfg_options,
        task='training' if args.training else 'prediction',
        batch_size=args.batch_size,
        shape=args.shape,
        channels=channels,
        device=device_name(args.device),
        precision=precision,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=seconds,
        before_mib=before / MIB,
        peak_mib=peak / MIB,
        rise_mib=(peak - before) / MIB,
    )


def report(figures: dict) -> str:
    """The figures in aligned lines."""
    height, width = figures['shape']
    what = 'two training steps' if figures['task'] == 'training' else 'one prediction'
    total, trained = figures['parameters'] / 1e6, figures['trained_parameters'] / 1e6
    rise, before = figures['rise_mib'], figures['before_mib']
    lines = {
        'config': figures['config'],
        'measured': f'{what}, {figures["precision"]}, on {figures["device"]}',
        'input': f'{figures["batch_size"]} x {figures["channels"]} x {height} x {width} (batch, channels, H, W)',
        'parameters': f'{total:.3f} M, {trained:.3f} M of them trained',
        'peak memory': f'{rise:.0f} MiB above the {before:.0f} MiB held once the model was built',
        'time': f'{figures["seconds"]:.1f} s',
    }
    width = max(map(len, lines))
    return '\n'.join(f'{key + ":":<{width + 1}} {value}' for key, value in lines.items())


def main() -> int:
    args = parse_args()
    return_freed_memory()
    MMLogger.get_instance('get_memory', log_level='WARNING')
    try:
        figures = measure(args)
    except LaunchError as error:
        print(f'get_memory.py: {error}', file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        height, width = args.shape
        print(
            f'get_memory.py: {args.batch_size} x {height} x {width} needs more memory than there is: use a smaller '
            f'--shape or --batch-size ({str(error).splitlines()[0]})',
            file=sys.stderr,
        )
        return 1
    print(report(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
