"""Data sets that are resampled, have one class or no objects, grey and 16-bit images, and large images cut to tiles."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import mmspatialmamba.apis  # noqa: F401
from mmspatialmamba.datasets.photo_digits import make_photo_digits
from mmspatialmamba.deploy import prepare_for_cpu

DEMO = Path(__file__).parents[1] / 'configs' / 'demo'
CHANNELS = [8, 16, 32, 64]
# The demo's config of each library, and what makes it small: two epochs, or four iterations.
SMALL = {
    'mmdet': (
        'mask-rcnn_spatialmamba-pico_fpn_photo-digits',
        {'model.neck.in_channels': CHANNELS, 'train_cfg.max_epochs': 2},
    ),
    'mmseg': (
        'spatialmamba-pico_upernet_photo-digits',
        {
            'model.decode_head.in_channels': CHANNELS,
            'model.auxiliary_head.in_channels': CHANNELS[2],
            'train_cfg': dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4),
            'default_hooks.checkpoint.interval': 2,
        },
    ),
    'mmpretrain': (
        'spatialmamba-pico_photo-digits',
        {'model.head.in_channels': CHANNELS[3], 'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2},
    ),
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data-kinds')
    root = folder / 'data' / 'photo_digits'
    make_photo_digits(root, 64, 4, num_val=2, cls_size=32, num_cls_train=10, num_cls_val=10)
    return folder


@pytest.fixture
def workspace(digits, monkeypatch):
    """The directory with a small PhotoDigits where the demo's configs look for it."""
    monkeypatch.chdir(digits)
    return digits


def small_config(scope: str, work_dir: Path) -> Config:
    init_default_scope(scope)
    name, options = SMALL[scope]
    cfg = Config.fromfile(str(DEMO / f'{name}.py'))
    backbone = dict(_delete_=True, embed_dims=CHANNELS[0], depths=(1, 1, 1, 1))
    cfg.merge_from_dict({'model.backbone.arch': backbone, 'train_dataloader.batch_size': 2, **options})
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    cfg.work_dir, cfg.experiment_name = str(work_dir), str(work_dir)
    return cfg


def train(cfg: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize(
    'scope, kind',
    [
        ('mmdet', dict(type='ClassAwareSampler', num_sample_class=1)),
        ('mmdet', dict(type='ClassBalancedDataset', oversample_thr=0.9)),
        ('mmseg', dict(type='RepeatDataset', times=2)),
        ('mmpretrain', dict(type='ClassBalancedDataset', oversample_thr=0.9)),
        ('mmpretrain', dict(type='RepeatDataset', times=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else value['type'],
)
def test_resampled_data_train_and_resume(workspace, tmp_path, scope, kind):
    cfg = small_config(scope, tmp_path / 'straight')
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    loader = cfg.train_dataloader
    plain = len(Runner.build_dataloader(copy.deepcopy(loader)).dataset)
    if kind['type'] == 'ClassAwareSampler':
        loader.sampler = kind
    else:
        loader.dataset = dict(kind, dataset=loader.dataset)
    straight = train(cfg)
    seen = len(straight.train_dataloader.dataset)
    assert seen == {'ClassAwareSampler': plain, 'RepeatDataset': 2 * plain}.get(kind['type'], seen)
    first = 'iter_2.pth' if scope == 'mmseg' else 'epoch_1.pth'
    cfg.merge_from_dict(dict(work_dir=str(tmp_path / 'resumed'), resume=True))
    cfg.load_from = str(tmp_path / 'straight' / first)
    resumed = train(cfg)
    assert resumed.iter == straight.iter > 0
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('with_objects', [1, 0], ids=['some', 'none'])
def test_one_class_and_images_without_objects(workspace, tmp_path, with_objects):
    """Only the first images have objects; batches, and the views of an image, have none at all."""
    cfg = small_config('mmdet', tmp_path / 'train')
    for split in ('train', 'val'):
        file = f'annotations/instances_{split}2017.json'
        data = json.loads((workspace / cfg.data_root / file).read_text())
        kept = {image['id'] for image in data['images'][:with_objects]}
        objects = [dict(item, category_id=1) for item in data['annotations'] if item['image_id'] in kept]
        data.update(annotations=objects, categories=[dict(id=1, name='digit')])
        (tmp_path / f'{split}.json').write_text(json.dumps(data))
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        dataset.ann_file = str(tmp_path / ('train.json' if name == 'train' else 'val.json'))
        dataset.metainfo = dict(classes=('digit',), palette=[(1, 2, 3)])
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(tmp_path / 'val.json')
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = 1

    runner = train(cfg)
    assert runner.iter == 4
    history = runner.message_hub.log_scalars
    for name in ('loss_rpn_bbox', 'loss_bbox', 'loss_mask'):
        losses = history[f'train/{name}'].data[0]
        assert np.isfinite(losses).all() and losses.min() == 0 and (losses.max() > 0) == bool(with_objects)
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())

    cfg.merge_from_dict(dict(load_from=str(tmp_path / 'train' / 'epoch_2.pth'), work_dir=str(tmp_path / 'test')))
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    for threshold in (0.0, 1.0):
        cfg.model.test_cfg.rcnn.score_thr = threshold
        tested = copy.deepcopy(cfg)
        tested.model = dict(cfg.tta_model, module=cfg.model)
        metrics = Runner.from_cfg(tested).test()
        # Where nothing is found, mmdet has no metrics; without objects they are -1.
        found = [metrics[key] for key in ('coco/bbox_mAP_50', 'coco/segm_mAP_50') if key in metrics]
        assert len(found) == (0 if threshold else 2) and all((value >= 0) == bool(with_objects) for value in found)


@pytest.mark.parametrize('scope', SMALL)
def test_grey_and_16_bit_images(workspace, tmp_path, scope):
    """The same images as colour files that are read as grey ones, as grey files, and with 16 bits."""
    cfg = small_config(scope, tmp_path)
    cfg.model.backbone.in_channels = 1
    if scope == 'mmpretrain':
        cfg.model.data_preprocessor = dict(cfg.data_preprocessor, type='ClsDataPreprocessor', to_rgb=False)
    else:
        cfg.model.data_preprocessor.bgr_to_rgb = False
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[:] = [step for step in pipeline if step.type != 'Resize']
    images, features = [], []
    for bits, options in (
        (None, dict(color_type='grayscale')),
        (8, dict(color_type='unchanged')),
        (16, dict(color_type='unchanged', to_float32=True)),
    ):
        pipeline[0].update(options)
        unit = 257.0 if bits == 16 else 1.0
        cfg.model.data_preprocessor.update(mean=[128 * unit], std=[60 * unit])
        dataset = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader)).dataset
        info = dataset.get_data_info(0)
        if bits:
            image = cv2.imread(info['img_path'], cv2.IMREAD_GRAYSCALE)
            info['img_path'] = str(tmp_path / 'grey.png')
            cv2.imwrite(info['img_path'], image.astype(np.uint16) * 257 if bits == 16 else image)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).eval()
        item = dataset.pipeline(info)
        images.append(
            model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))['inputs']
        )
        with torch.no_grad():
            features.append(model.backbone(images[-1]))
    assert images[0].shape[:2] == (1, 1) and images[0].std() > 0.1
    torch.testing.assert_close(images[1:], [images[0]] * 2)
    torch.testing.assert_close(features[1:], [features[0]] * 2, rtol=1e-4, atol=1e-4)


def tiles(image: np.ndarray, size: int, step: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Cut an image to square tiles; the last ones of a row and of a column end with the image."""
    ys, xs = (sorted({min(start, side - size) for start in range(0, side, step)}) for side in image.shape[:2])
    corners = [(x, y) for y in ys for x in xs]
    return corners, [image[y : y + size, x : x + size] for x, y in corners]


@pytest.mark.slow
@pytest.mark.parametrize('prepare', [False, True], ids=['plain', 'prepared'])
def test_tiles_of_a_large_image_do_not_depend_on_their_batch(workspace, tmp_path, prepare):
    cfg = small_config('mmdet', tmp_path)
    cfg.dump(tmp_path / 'config.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    meta = dict(dataset_meta=cfg.metainfo.to_dict())
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'weights.pth')
    files = {'model': str(tmp_path / 'config.py'), 'weights': str(tmp_path / 'weights.pth')}
    infer = DetInferencer(**files, device='cpu', show_progress=False)
    if prepare:
        infer.model = prepare_for_cpu(infer.model)

    def predict(images, batch_size):
        found = infer(images, batch_size=batch_size, return_datasamples=True)['predictions']
        return [sample.pred_instances for sample in found]

    def merge(found):
        """Merge tiles as SAHI does: shifted boxes, then NMS over all of them."""
        for instances, corner in zip(found, corners):
            instances.bboxes += torch.tensor(corner * 2)
        both = InstanceData.cat([InstanceData(bboxes=f.bboxes, scores=f.scores, labels=f.labels) for f in found])
        nms = dict(type='nms', iou_threshold=0.5)
        return both[batched_nms(both.bboxes, both.scores, both.labels, nms)[1]]

    noise = np.random.default_rng(0).integers(0, 256, (160, 224, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3)
    corners, crops = tiles(image, size=96, step=64)
    assert corners == [(x, y) for y in (0, 64) for x in (0, 64, 128)]
    alone, together = predict(crops, 1), predict(crops, len(crops))
    for one, other in zip(alone, together):
        assert len(one) > 10 and torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.bboxes, other.bboxes, rtol=0, atol=1e-3)
        assert (one.masks != other.masks).float().mean() < 1e-4
    merged = merge(alone)
    torch.testing.assert_close(merged.bboxes, merge(together).bboxes, rtol=0, atol=1e-3)
    assert merged.bboxes[:, 2].max() > 128 + 48 and merged.bboxes[:, 3].max() > 64 + 48
