"""Every head trains, tests and, where it can, tests with augmentation on PhotoDigits, by the libraries' own scripts.

``python tests/test_heads.py [ITERATIONS]`` runs them for longer and prints what came out as a table.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from small_runs import TOOLS, run_script

from mmspatialmamba.datasets.photo_digits import CLASSES, PALETTE, SEG_PALETTE, make_photo_digits

SIZE = 96
CHANNELS = [16, 32, 64, 128]
HEADS = {
    'cascade-mask-rcnn': 'detection/cascade-mask-rcnn_spatialmamba-tiny_fpn_4conv1fc-giou_ms-crop-3x_coco',
    'retinanet': 'detection/retinanet_spatialmamba-tiny_fpn_1x_coco',
    'mask2former': 'detection/mask2former_spatialmamba-tiny_8xb2-lsj-50e_coco',
    'mask2former-panoptic': 'detection/mask2former_spatialmamba-tiny_8xb2-lsj-50e_coco-panoptic',
    'dino': 'detection/dino-4scale_spatialmamba-tiny_8xb2-12e_coco',
    'semantic-fpn': 'segmentation/spatialmamba-tiny_fpn_8xb4-80k_ade20k-512x512',
    'segformer-head': 'segmentation/spatialmamba-tiny_segformer_8xb2-160k_ade20k-512x512',
    'mask2former-semantic': 'segmentation/spatialmamba-tiny_mask2former_8xb2-160k_ade20k-512x512',
    'upernet-cityscapes': 'segmentation/spatialmamba-tiny_upernet_4xb2-80k_cityscapes-512x1024',
}
METRICS = {
    'cascade-mask-rcnn': ('coco/bbox_mAP', 'coco/segm_mAP'),
    'retinanet': ('coco/bbox_mAP',),
    'mask2former': ('coco/bbox_mAP', 'coco/segm_mAP'),
    'mask2former-panoptic': ('coco_panoptic/PQ', 'coco/segm_mAP'),
    'dino': ('coco/bbox_mAP',),
}
THINGS = dict(classes=CLASSES, palette=PALETTE)
PANOPTIC = dict(
    classes=(*CLASSES, 'photo'), thing_classes=CLASSES, stuff_classes=('photo',), palette=[*PALETTE, SEG_PALETTE[0]]
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('heads'), num_train=24, num_val=4)


def make_data(folder: Path, num_train: int, num_val: int) -> Path:
    """PhotoDigits under the names that the libraries' configs look for in the working directory."""
    make_photo_digits(folder / 'photo_digits', SIZE, num_train, num_val, num_cls_train=1, num_cls_val=1)
    (folder / 'data' / 'ade').mkdir(parents=True)
    (folder / 'data' / 'coco').symlink_to(folder / 'photo_digits' / 'coco')
    (folder / 'data' / 'ade' / 'ADEChallengeData2016').symlink_to(folder / 'photo_digits' / 'ade')
    for split, name in (('training', 'train'), ('validation', 'val')):
        images, maps = (folder / 'data' / 'cityscapes' / kind / name for kind in ('leftImg8bit', 'gtFine'))
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for path in (folder / 'photo_digits' / 'ade' / 'images' / split).glob('*.jpg'):
            classes = cv2.imread(
                str(path.parents[2] / 'annotations' / split / f'{path.stem}.png'), cv2.IMREAD_UNCHANGED
            )
            cv2.imwrite(str(images / f'{path.stem}_leftImg8bit.png'), cv2.imread(str(path)))
            cv2.imwrite(str(maps / f'{path.stem}_gtFine_labelTrainIds.png'), classes - 1)
    return folder


def small_detector(head: str, cfg: Config) -> dict:
    """What makes a detector small, and its data set PhotoDigits."""
    panoptic = head == 'mask2former-panoptic'
    metainfo = PANOPTIC if panoptic else THINGS
    options = {
        'optim_wrapper.optimizer.lr': 1e-3 if head in ('cascade-mask-rcnn', 'retinanet') else 4e-4,
        'train_dataloader.dataset.metainfo': metainfo,
        'val_dataloader.dataset.metainfo': metainfo,
        'test_dataloader.dataset.metainfo': metainfo,
        'model.data_preprocessor.batch_augments': None,
    }
    resize = dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True)
    for name in ('train', 'val', 'test'):
        pipeline = cfg[f'{name}_dataloader'].dataset.pipeline
        kept = [step for step in pipeline if step.type in ('LoadImageFromFile', 'PackDetInputs')]
        loads = [step for step in pipeline if step.type.startswith('Load') and step.type != 'LoadImageFromFile']
        options[f'{name}_dataloader.dataset.pipeline'] = [kept[0], *loads, resize, *kept[1:]]
    if head == 'cascade-mask-rcnn':
        options.update(
            {
                'model.neck.in_channels': CHANNELS,
                'model.neck.out_channels': 64,
                'model.rpn_head.in_channels': 64,
                'model.rpn_head.feat_channels': 64,
                'model.rpn_head.anchor_generator.scales': [5],
                'model.roi_head.bbox_roi_extractor.out_channels': 64,
                'model.roi_head.mask_roi_extractor.out_channels': 64,
                'model.roi_head.mask_head.in_channels': 64,
                'model.roi_head.mask_head.conv_out_channels': 64,
                'model.roi_head.mask_head.num_classes': 10,
                'model.train_cfg.rpn_proposal.max_per_img': 100,
                'model.test_cfg.rpn.max_per_img': 20,
                'model.test_cfg.rcnn.score_thr': 0.0,
            }
        )
        sizes = dict(
            num_classes=10, in_channels=64, conv_out_channels=64, fc_out_channels=128, norm_cfg=dict(type='BN')
        )
        for stage in range(3):
            options.update({f'model.roi_head.bbox_head.{stage}.{key}': value for key, value in sizes.items()})
            options[f'model.train_cfg.rcnn.{stage}.sampler.num'] = 32
    elif head == 'retinanet':
        options.update(
            {
                'model.neck.in_channels': CHANNELS[1:],
                'model.neck.out_channels': 64,
                'model.bbox_head.in_channels': 64,
                'model.bbox_head.feat_channels': 64,
                'model.bbox_head.stacked_convs': 2,
                'model.bbox_head.num_classes': 10,
                'model.test_cfg.score_thr': 0.0,
            }
        )
    elif head == 'dino':
        options.update(
            {
                'model.neck.in_channels': CHANNELS[1:],
                'model.num_queries': 50,
                'model.encoder.num_layers': 2,
                'model.decoder.num_layers': 2,
                'model.bbox_head.num_classes': 10,
            }
        )
    else:
        options.update(
            {
                'model.panoptic_head.num_things_classes': 10,
                'model.panoptic_head.num_stuff_classes': int(panoptic),
                'model.panoptic_head.loss_cls.class_weight': [1.0] * (10 + panoptic) + [0.1],
                'model.panoptic_fusion_head.num_things_classes': 10,
                'model.panoptic_fusion_head.num_stuff_classes': int(panoptic),
                'model.panoptic_head.pixel_decoder.encoder.num_layers': 2,
                'model.panoptic_head.transformer_decoder.num_layers': 2,
                'model.panoptic_head.in_channels': CHANNELS,
                'model.panoptic_head.num_queries': 20,
                'model.train_cfg.num_points': 512,
            }
        )
    return options


def small_segmentor(head: str, cfg: Config) -> dict:
    """What makes a segmentor small."""
    options = {
        'optim_wrapper.optimizer.lr': 4e-4 if head == 'mask2former-semantic' else 2e-3,
        'model.data_preprocessor.size': (SIZE, SIZE),
    }
    resize = dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True)
    for name in ('train', 'val', 'test'):
        kept = [step for step in cfg[f'{name}_dataloader'].dataset.pipeline if step.type.startswith(('Load', 'Pack'))]
        options[f'{name}_dataloader.dataset.pipeline'] = [*kept[:2], resize, *kept[2:]]
    if head == 'semantic-fpn':
        options.update({'model.neck.in_channels': CHANNELS, 'model.decode_head.norm_cfg.type': 'BN'})
    elif head == 'mask2former-semantic':
        options.update(
            {
                'model.decode_head.in_channels': CHANNELS,
                'model.decode_head.num_queries': 20,
                'model.decode_head.pixel_decoder.encoder.num_layers': 2,
                'model.decode_head.transformer_decoder.num_layers': 2,
                'model.decode_head.train_cfg.num_points': 512,
            }
        )
    else:
        options.update(
            {
                'model.decode_head.in_channels': CHANNELS,
                'model.decode_head.channels': 64,
                'model.decode_head.norm_cfg.type': 'BN',
            }
        )
    if head == 'upernet-cityscapes':
        options.update(
            {
                'model.auxiliary_head.in_channels': CHANNELS[2],
                'model.auxiliary_head.channels': 32,
                'model.auxiliary_head.norm_cfg.type': 'BN',
            }
        )
    return options


def small_config(head: str, iterations: int, batch_size: int) -> Config:
    """A head's config, made small, for PhotoDigits and for a short schedule without a warm-up."""
    path = TOOLS.parent / 'configs' / f'{HEADS[head]}.py'
    cfg = Config.fromfile(path)
    options = (small_detector if cfg.default_scope == 'mmdet' else small_segmentor)(head, cfg)
    cfg.merge_from_dict(
        {
            **options,
            'model.backbone.arch': dict(_delete_=True, embed_dims=CHANNELS[0], depths=(1, 1, 1, 1)),
            'model.backbone.drop_path_rate': 0.0,
            'train_dataloader.batch_size': batch_size,
            'default_hooks.logger.interval': 1,
            'default_hooks.checkpoint': dict(
                _delete_=True, type='ResumableCheckpointHook', by_epoch=False, interval=iterations
            ),
        }
    )
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.batch_sampler = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
    cfg.log_processor.by_epoch = False
    cfg.param_scheduler = []
    cfg.randomness = dict(seed=0)
    if 'tta_pipeline' in cfg:
        views = [dict(type='Resize', scale=(size, size), keep_ratio=True) for size in (SIZE, SIZE * 5 // 4)]
        cfg.tta_pipeline[1].transforms[0] = views
    return cfg


def run(
    head: str, folder: Path, iterations: int, batch_size: int, tta: bool
) -> tuple[list[float], dict[str, float], dict[str, float]]:
    """Train and test a head: the loss of each iteration, the metrics at the end, and those with ``--tta``."""
    cfg = small_config(head, iterations, batch_size)
    cfg.dump(folder / f'{head}.py')
    stand_ins = Path(__file__).parent / 'stand_ins'
    commands = {'train': ['train.py', f'{head}.py', '--work-dir', head]}
    if tta:
        checkpoint = f'{head}/iter_{iterations}.pth'
        commands['tta'] = ['test.py', f'{head}.py', checkpoint, '--tta', '--work-dir', f'{head}-tta']
    records = {}
    for name, (script, *args) in commands.items():
        result = run_script(sys.executable, TOOLS / script, *args, cwd=folder, PYTHONPATH=stand_ins)
        assert result.returncode == 0, result.stderr[-3000:]
        work_dir = folder / (head if name == 'train' else f'{head}-tta')
        (path,) = work_dir.glob('*/vis_data/scalars.json') if name == 'train' else work_dir.glob('*/*.json')
        records[name] = [json.loads(line) for line in path.read_text().splitlines()]
    *steps, metrics = records['train']
    return [step['loss'] for step in steps], metrics, records['tta'][-1] if 'tta' in records else {}


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_head_trains_and_tests(head, folder):
    # test_models/test_tta.py does this to segmenters; RetinaNet has the same model for it as DINO.
    tta = head in ('cascade-mask-rcnn', 'mask2former', 'dino')
    losses, metrics, augmented = run(head, folder, iterations=16, batch_size=2, tta=tta)
    assert len(losses) == 16 and np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    for metric in METRICS.get(head, ('mIoU',)):
        assert 0 <= metrics[metric] <= 100
        assert not tta or 0 <= augmented[metric] <= 100


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as path:
        folder = make_data(Path(path), num_train=600, num_val=100)
        print('| head | loss, first and last tenth | metrics | with --tta | minutes |\n|---|---|---|---|---|')
        for head in HEADS:
            start = time.monotonic()
            tta = head != 'mask2former-panoptic'
            losses, metrics, augmented = run(head, folder, iterations, batch_size=4, tta=tta)
            minutes = (time.monotonic() - start) / 60
            tenth = len(losses) // 10
            shown = [
                ', '.join(f'{m.split("/")[-1]} {found[m]:.3f}' for m in METRICS.get(head, ('mIoU',))) if found else '-'
                for found in (metrics, augmented)
            ]
            loss = f'{np.mean(losses[:tenth]):.2f}, {np.mean(losses[-tenth:]):.2f}'
            print(f'| {head} | {loss} | {" | ".join(shown)} | {minutes:.1f} |', flush=True)


if __name__ == '__main__':
    main()
