import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmspatialmamba.datasets.photo_digits import make_photo_digits
from mmspatialmamba.models.tta import InstanceSegTTAModel

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
SHAPE = (40, 50)
AXES = {None: (), 'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}


class Views(nn.Module):
    """A detector whose predictions are the data samples it is given. As mmdet's cascades, it may not know of flips."""

    def test_step(self, data):
        assert not any(sample.flip for sample in data['data_samples'])
        return data['data_samples']


def make_instances(*instances):
    """Instances from (box, score, label, mask) each; a mask of None is the whole box."""
    masks = torch.zeros(len(instances), *SHAPE, dtype=torch.bool)
    for plane, (box, _, _, mask) in zip(masks, instances):
        x1, y1, x2, y2 = map(int, box)
        plane[y1:y2, x1:x2] = True if mask is None else mask
    return InstanceData(
        bboxes=torch.tensor([box for box, *_ in instances], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([score for _, score, _, _ in instances], dtype=torch.float32),
        labels=torch.tensor([label for _, _, label, _ in instances], dtype=torch.int64),
        masks=masks,
    )


def flipped(found, direction):
    """What a perfect detector predicts in the flipped image."""
    height, width = SHAPE
    x1, y1, x2, y2 = found.bboxes.unbind(1)
    if direction in ('horizontal', 'diagonal'):
        x1, x2 = width - x2, width - x1
    if direction in ('vertical', 'diagonal'):
        y1, y2 = height - y2, height - y1
    return InstanceData(
        bboxes=torch.stack([x1, y1, x2, y2], dim=1),
        scores=found.scores,
        labels=found.labels,
        masks=found.masks.flip(AXES[direction]),
    )


def make_view(found, direction=None, **meta):
    meta = {'ori_shape': SHAPE, 'flip': direction is not None, 'flip_direction': direction, **meta}
    return DetDataSample(metainfo=meta, pred_instances=flipped(found, direction))


def merge(*views, module=None, max_per_img=100):
    """Merge views of one image and return its instances."""
    tta_cfg = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=max_per_img)
    model = InstanceSegTTAModel(module or Views(), tta_cfg)
    data = dict(inputs=[[None]] * len(views), data_samples=[[view] for view in views])
    (sample,) = model.test_step(data)
    return sample.pred_instances


def assert_same(merged, expected):
    torch.testing.assert_close(merged.bboxes, expected.bboxes)
    torch.testing.assert_close(merged.scores, expected.scores)
    assert torch.equal(merged.labels, expected.labels)
    assert merged.masks.dtype == torch.bool and torch.equal(merged.masks, expected.masks)


@pytest.fixture
def letters():
    """Two instances whose masks are like no flip of themselves."""
    mask = torch.zeros(12, 9, dtype=torch.bool)
    mask[:, :3] = mask[8:] = mask[0, 5] = True
    return make_instances(((5, 3, 14, 15), 0.8, 1, mask), ((30, 20, 39, 32), 0.6, 0, mask))


@pytest.mark.parametrize('direction', AXES, ids=str)
def test_one_view_is_the_plain_result(letters, direction):
    assert_same(merge(make_view(letters, direction)), letters)


@pytest.mark.parametrize('direction', list(AXES)[1:])
def test_flips_are_undone(letters, direction):
    assert_same(merge(make_view(letters), make_view(letters, direction)), letters)


def test_undoes_what_the_pipeline_does(letters):
    init_default_scope('mmdet')
    flips = [dict(type='RandomFlip', prob=float(d is not None), direction=d or 'horizontal') for d in AXES]
    resizes = [dict(type='Resize', scale=(factor * SHAPE[1], factor * SHAPE[0])) for factor in (1, 2)]
    augment = TRANSFORMS.build(dict(type='TestTimeAug', transforms=[resizes, flips, [dict(type='PackDetInputs')]]))
    results = dict(
        img=np.zeros((*SHAPE, 3), dtype=np.uint8),
        img_shape=SHAPE,
        ori_shape=SHAPE,
        gt_bboxes=HorizontalBoxes(letters.bboxes),
        gt_bboxes_labels=letters.labels.numpy(),
        gt_masks=BitmapMasks(letters.masks.numpy().astype(np.uint8), *SHAPE),
    )
    views = augment(results)['data_samples']
    for view in views:
        factor = int(view.scale_factor[0])
        view.pred_instances = InstanceData(
            bboxes=view.gt_instances.bboxes.tensor / factor,
            scores=letters.scores,
            labels=letters.labels,
            masks=torch.from_numpy(view.gt_instances.masks.masks[:, ::factor, ::factor]).bool(),
        )
    assert len(views) == 8 and len({str(view.pred_instances.bboxes) for view in views}) == 4
    assert_same(merge(*views), letters)


def test_every_image_of_a_batch_is_merged(letters):
    model = InstanceSegTTAModel(Views(), dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    views = [
        [make_view(letters[:1], direction, img_id=7), make_view(letters[1:], direction, img_id=8)]
        for direction in (None, 'horizontal')
    ]
    first, second = model.test_step(dict(inputs=views, data_samples=views))
    assert (first.img_id, second.img_id) == (7, 8)
    assert_same(first.pred_instances, letters[:1])
    assert_same(second.pred_instances, letters[1:])


def test_box_and_mask_are_averages_weighted_by_score():
    views = [
        make_view(make_instances(((10, 10, 20, 20), 0.9, 2, None))),
        make_view(make_instances(((12, 10, 22, 20), 0.3, 2, None)), 'horizontal'),
        make_view(make_instances(((12, 10, 22, 20), 0.5, 2, None))),
    ]
    expected = make_instances(((10, 10, 20, 20), (0.9 + 0.3 + 0.5) / 3, 2, None))
    expected.bboxes[0, 0::2] += 2 * 0.8 / 1.7
    assert_same(merge(*views), expected)


def test_an_overlapping_box_of_another_label_stays():
    views = [make_view(make_instances(((10, 10, 20, 20), 0.5, label, None))) for label in (0, 1)]
    merged = merge(*views)
    assert merged.labels.tolist() == [0, 1]
    assert merged.scores.tolist() == [0.25, 0.25]


def test_what_one_view_alone_finds_counts_for_less():
    sure, seen_twice = ((0, 0, 9, 9), 0.9, 0, None), ((20, 20, 30, 30), 0.6, 0, None)
    expected = make_instances((seen_twice[0], 0.4, 0, None), (sure[0], 0.3, 0, None))
    for kept in (2, 1):
        views = [make_view(make_instances(*found)) for found in ([sure, seen_twice], [seen_twice], [])]
        assert_same(merge(*views, max_per_img=kept), expected[:kept])


@pytest.mark.parametrize('num_views', [1, 3])
def test_views_without_instances(num_views):
    assert_same(merge(*[make_view(make_instances()) for _ in range(num_views)]), make_instances())


def test_an_instance_without_pixels():
    nothing = torch.zeros(10, 10, dtype=torch.bool)
    found = make_instances(((10, 10, 20, 20), 0.5, 0, nothing))
    assert_same(merge(make_view(found), make_view(found, 'diagonal')), found)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)


def merge_by_loops(views, threshold):
    """The same merging, box by box on whole masks."""
    boxes = [(score, v, i) for v, view in enumerate(views) for i, score in enumerate(view.scores.tolist())]
    groups = []
    for _, v, i in sorted(boxes, reverse=True):
        for label, leader, members in groups:
            if label == views[v].labels[i] and iou(leader, views[v].bboxes[i].tolist()) > threshold:
                members.setdefault(v, i)
                break
        else:
            groups.append((views[v].labels[i], views[v].bboxes[i].tolist(), {v: i}))
    merged = []
    for label, _, members in groups:
        weights = np.array([views[v].scores[i].item() for v, i in members.items()])
        boxes = np.stack([views[v].bboxes[i].numpy() for v, i in members.items()])
        masks = np.stack([views[v].masks[i].numpy() for v, i in members.items()])
        share = np.einsum('m,mhw->hw', weights, masks) / weights.sum()
        merged.append((weights.sum() / len(views), label.item(), weights @ boxes / weights.sum(), share >= 0.5))
    return sorted(merged, key=lambda group: -group[0])


@pytest.mark.parametrize('seed', range(5))
def test_equals_merging_by_loops(seed):
    rng = np.random.default_rng(seed)
    objects = rng.uniform((0, 0, 8, 8), (30, 20, 20, 20), (6, 4))
    views = []
    for _ in range(4):
        found = []
        for i in rng.permutation(12)[:9] % 6:
            x, y, w, h = objects[i] + rng.uniform(-3, 3, 4)
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, SHAPE[1]), min(y + h, SHAPE[0])
            mask = torch.from_numpy(rng.random((int(y2) - int(y1), int(x2) - int(x1))) < 0.7)
            found.append(((x1, y1, x2, y2), rng.uniform(0.05, 1), int(i) % 2, mask))
        views.append(make_instances(*found))
    directions = list(AXES)
    merged = merge(*[make_view(view, direction) for view, direction in zip(views, directions)])
    expected = merge_by_loops(views, 0.5)
    assert len(merged) == len(expected) < sum(map(len, views))
    for i, (score, label, box, mask) in enumerate(expected):
        assert merged.scores[i].item() == pytest.approx(score, abs=1e-6)
        assert merged.labels[i].item() == label
        np.testing.assert_allclose(merged.bboxes[i].numpy(), box, atol=1e-4)
        np.testing.assert_array_equal(merged.masks[i].numpy(), mask)


def test_whole_masks_of_one_view_only_are_in_memory(letters):
    class Watched(Views):
        alive = []

        def test_step(self, data):
            assert not [masks for masks in self.alive if masks() is not None]
            samples = [make_view(letters) for _ in data['data_samples']]
            self.alive += [weakref.ref(sample.pred_instances.masks) for sample in samples]
            return samples

    module = Watched()
    assert_same(merge(*(make_view(letters) for _ in range(3)), module=module), letters)
    assert len(module.alive) == 3


@pytest.mark.parametrize('predicted', ['boxes without masks', 'pred_instances, pred_panoptic_seg'])
def test_refuses_what_is_not_instances_with_masks(letters, predicted):
    view = make_view(letters)
    if predicted == 'boxes without masks':
        del view.pred_instances.masks
    else:
        view.pred_panoptic_seg = PixelData()
    with pytest.raises(ValueError, match=f"Views predicts {predicted}: .*set tta_model.type='DetTTAModel'"):
        merge(view)


def test_refuses_a_view_that_may_be_flipped(letters):
    view = make_view(letters)
    view.pop('flip')
    with pytest.raises(ValueError, match="meta_keys 'flip' and 'flip_direction'"):
        merge(view)


@pytest.mark.slow
def test_a_detector_in_one_view_is_the_detector():
    init_default_scope('mmdet')
    cfg = Config.fromfile(str(CONFIGS / 'demo' / 'mask-rcnn_spatialmamba-pico_fpn_photo-digits.py'))
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model).eval()
    model = MODELS.build(dict(cfg.tta_model, module=detector)).eval()
    assert isinstance(model, InstanceSegTTAModel)
    image = torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8)
    meta = dict(ori_shape=SHAPE, img_shape=(80, 100), scale_factor=(2.0, 2.0), flip=False, flip_direction=None)
    with torch.no_grad():
        (plain,) = detector.test_step(dict(inputs=[image], data_samples=[DetDataSample(metainfo=meta)]))
        (merged,) = model.test_step(dict(inputs=[[image]], data_samples=[[DetDataSample(metainfo=meta)]]))
    assert len(plain.pred_instances) > 1
    assert_same(merged.pred_instances, plain.pred_instances)


def views_of(cfg):
    """The choices of ``TestTimeAug`` by type of transform."""
    (augmentation,) = [transform for transform in cfg.tta_pipeline if transform.type == 'TestTimeAug']
    return {choices[0].type: choices for choices in augmentation.transforms}


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem)
        for path in sorted((CONFIGS / 'detection').glob('*mask*.py'))
        if not path.stem.endswith('panoptic')
    ],
)
def test_published_detectors_merge_masks_of_three_scales_and_flips(path):
    cfg = Config.fromfile(str(path))
    assert cfg.tta_model == dict(
        type='mmspatialmamba.models.tta.InstanceSegTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    )
    views = views_of(cfg)
    assert {resize.scale for resize in views['Resize']} == {(1066, 640), (1333, 800), (1600, 960)}
    assert {flip.prob for flip in views['RandomFlip']} == {0.0, 1.0}


@pytest.mark.parametrize(
    'path', [pytest.param(p, id=p.stem) for p in sorted((CONFIGS / 'segmentation').glob('*ade*.py'))]
)
def test_published_segmenters_use_the_published_views(path):
    cfg = Config.fromfile(str(path))
    assert cfg.tta_model.type == 'SegTTAModel'
    views = views_of(cfg)
    assert [resize.scale_factor for resize in views['Resize']] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert {flip.prob for flip in views['RandomFlip']} == {0.0, 1.0}


SMALL_BACKBONE = 'backbone=dict(arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1)))'
SCRIPTS = {
    'classification/spatialmamba-tiny_8xb128_in1k.py': (
        f'model = dict({SMALL_BACKBONE}, head=dict(in_channels=64))\n'
        "data = dict(_delete_=True, type='CustomDataset', data_root='digits/imagenet', data_prefix='val',\n"
        '            pipeline={{_base_.test_pipeline}})\n',
        {'accuracy/top1', 'accuracy/top5'},
    ),
    'detection/mask-rcnn_spatialmamba-tiny_fpn_1x_coco.py': (
        f'model = dict({SMALL_BACKBONE}, neck=dict(in_channels=[8, 16, 32, 64], out_channels=8),\n'
        '    rpn_head=dict(in_channels=8, feat_channels=8),\n'
        '    roi_head=dict(bbox_roi_extractor=dict(out_channels=8), mask_roi_extractor=dict(out_channels=8),\n'
        '                  bbox_head=dict(in_channels=8, fc_out_channels=8, num_classes=10),\n'
        '                  mask_head=dict(in_channels=8, conv_out_channels=8, num_classes=10)))\n'
        "data = dict(data_root='digits/coco', metainfo=dict(classes=tuple('0123456789')))\n"
        "test_evaluator = dict(ann_file='digits/coco/annotations/instances_val2017.json')\n",
        {'coco/bbox_mAP', 'coco/segm_mAP'},
    ),
    'segmentation/spatialmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py': (
        f'model = dict({SMALL_BACKBONE}, decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),\n'
        '             auxiliary_head=dict(in_channels=32, channels=8))\n'
        "data = dict(data_root='digits/ade')\n",
        {'mIoU'},
    ),
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A directory with a PhotoDigits of an image in each split."""
    folder = tmp_path_factory.mktemp('tta')
    make_photo_digits(folder / 'digits', 64, 1, num_val=1, cls_size=48, num_cls_train=10, num_cls_val=10)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', SCRIPTS, ids=lambda name: name.split('/')[0])
def test_published_configs_under_their_library_s_script(digits, tmp_path, name):
    changes, metrics = SCRIPTS[name]
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(CONFIGS / name)!r}\n{changes}'
        'test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)\n'
    )
    cfg = Config.fromfile(str(config))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta={}), tmp_path / 'random.pth')
    script = [sys.executable, ROOT / 'tools' / 'test.py', config, tmp_path / 'random.pth', '--tta']
    result = subprocess.run(
        [*map(str, script), '--work-dir', str(tmp_path / 'test')],
        cwd=digits,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = (tmp_path / 'test').glob('*/*.json')
    assert metrics <= set(json.loads(path.read_text()))
