"""PhotoDigits: its bytes, its bounds, its formats as the libraries read them, its errors."""

from __future__ import annotations

import json
import os
import runpy
import sys
from importlib.resources import files
from pathlib import Path

import cv2
import mmdet.datasets  # noqa: F401
import mmpretrain.datasets  # noqa: F401
import mmseg.datasets  # noqa: F401
import numpy as np
import pytest
from mmdet.registry import DATASETS as DET_DATASETS
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS as CLS_DATASETS
from mmseg.registry import DATASETS as SEG_DATASETS
from sklearn.neighbors import KNeighborsClassifier

from mmspatialmamba.datasets import photo_digits
from mmspatialmamba.datasets.photo_digits import (
    CLASSES,
    PALETTE,
    SEG_CLASSES,
    SEG_PALETTE,
    SettingsError,
    compose_crop,
    compose_scene,
    load_source,
    make_photo_digits,
)

SIZE = 128
SMALL = {'size': 48, 'num_train': 3, 'num_val': 2, 'cls_size': 32, 'num_cls_train': 10}
TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'photo_digits.py'
LUMA = np.array([0.299, 0.587, 0.114])


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


@pytest.fixture
def run_tool(monkeypatch, capfd):
    """Run the converter; return its exit status, standard output and standard error."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *map(str, args)])
        status = 0
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('photo_digits') / 'data'
    assert make_photo_digits(root, SIZE, 12, num_val=4, num_cls_train=30, num_cls_val=20)
    return root


def build_dataset(scope, cfg):
    registry = {'mmdet': DET_DATASETS, 'mmseg': SEG_DATASETS, 'mmpretrain': CLS_DATASETS}[scope]
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(cfg)


def scenes(split, number, size=SIZE):
    source = load_source(split)
    for index in range(number):
        yield compose_scene(np.random.default_rng([7, index]), source, size)


def test_equal_seeds_give_equal_bytes(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        make_photo_digits(tmp_path / name, **SMALL, seed=seed)
    first, second, other = (contents(tmp_path / name) for name in 'abc')
    assert first == second
    assert first.keys() == other.keys()
    images = [name for name in first if name.endswith('.jpg')]
    assert len(images) == 2 * 5 + 10 + 8
    assert all(first[name] != other[name] for name in images)


def test_images_do_not_depend_on_their_number(tmp_path):
    make_photo_digits(tmp_path / 'few', **SMALL)
    make_photo_digits(tmp_path / 'more', **{**SMALL, 'num_train': 5, 'num_cls_train': 12})
    few, more = contents(tmp_path / 'few'), contents(tmp_path / 'more')
    images = [name for name in few if name.endswith(('.jpg', '.png'))]
    assert all(few[name] == more[name] for name in images)
    assert len(more) == len(few) + 2 * 4 + 2


def test_splits_share_no_scan():
    fields = {
        split: [{scan.tobytes() for scan in scans} for scans in load_source(split)[0]] for split in ('train', 'val')
    }
    train, val = (set().union(*fields[split]) for split in ('train', 'val'))
    assert not train & val
    assert (len(train), len(val)) == (1300, 497)
    assert all(48 <= len(scans) <= 51 for scans in fields['val'])


def test_splits_share_no_pixel_of_a_photograph():
    paths = [files(package) / name for package, names in photo_digits.PHOTOS.items() for name in names.split()]
    for path, *parts in zip(paths, *(load_source(split)[1] for split in ('train', 'val'))):
        assert np.array_equal(np.hstack(parts), cv2.imread(str(path))[..., ::-1])


@pytest.mark.parametrize('size', [32, 100, SIZE])
def test_scene_bounds(size):
    occlusion, numbers = [], []
    for scene in scenes('train', 60, size):
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.labels), size, size)
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.any(axis=(1, 2)).all()
        occlusion.extend(scene.occlusion)
        numbers.append(len(scene.labels))
    assert min(occlusion) >= 0 and max(occlusion) <= 0.35
    assert np.mean(np.array(occlusion) > 0.05) > 0.08, 'occlusion should occur'
    assert set(numbers) >= {1, 2, 3, 4} and max(numbers) <= 5


def test_digits_are_as_large_as_promised():
    lengths = []
    for scene in scenes('train', 60):
        for mask in scene.masks[scene.occlusion == 0]:
            lengths.append(max(np.ptp(axis) + 1 for axis in np.nonzero(mask)))
    assert min(lengths) >= 0.22 * SIZE - 2 and max(lengths) <= 0.5 * SIZE + 2
    assert np.ptp(lengths) > 0.15 * SIZE


@pytest.mark.parametrize('split', ['train', 'val'])
def test_crop_bounds(split):
    source = load_source(split)
    lengths, neighbours = [], 0
    for index in range(80):
        scene = compose_crop(np.random.default_rng([8, index]), source, 64, index % 10)
        assert scene.labels[0] == index % 10
        assert 0 <= scene.occlusion[0] <= 0.35
        if scene.occlusion[0] == 0:
            lengths.append(max(np.ptp(axis) + 1 for axis in np.nonzero(scene.masks[0])))
        neighbours += len(scene.labels) - 1
    assert min(lengths) >= 0.55 * 64 - 2 and max(lengths) <= 0.9 * 64 + 2
    assert 5 < neighbours < 60


def test_digits_contrast_with_their_surroundings(data_root):
    """Measured on the JPEG files: luma inside each mask against the photograph around it."""
    contrasts = []
    for split in ('training', 'validation'):
        for path in sorted((data_root / 'ade' / 'images' / split).glob('*.jpg')):
            luma = cv2.imread(str(path))[..., ::-1] / 255 @ LUMA
            png = data_root / 'ade' / 'annotations' / split / f'{path.stem}.png'
            segments = cv2.imread(str(png), cv2.IMREAD_UNCHANGED)
            digits = (segments > 1).astype(np.uint8)
            far = cv2.dilate(digits, np.ones((7, 7), np.uint8)) == 0
            for value in np.unique(segments[segments > 1]):
                mask = (segments == value).astype(np.uint8)
                core = cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0
                ring = (cv2.dilate(mask, np.ones((17, 17), np.uint8)) > 0) & far
                contrasts.append(abs(luma[core].mean() - luma[ring].mean()))
    assert len(contrasts) > 30
    assert np.min(contrasts) >= 0.4
    assert np.median(contrasts) >= 0.5


@pytest.mark.slow
def test_digits_are_readable():
    """Neighbours among the training scans name most digits cut out of validation images."""

    def glyphs(split, number):
        shapes, labels, source = [], [], load_source(split)
        for index in range(number):
            label = index % 10
            scene = compose_crop(np.random.default_rng([9, index]), source, 64, label)
            image, mask = scene.image.astype(np.float32), scene.masks[0]
            colour = np.median(image[mask], axis=0)
            x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
            near = np.linalg.norm(image - colour, axis=2)[y : y + h, x : x + w] < 60
            square = np.zeros((max(w, h), max(w, h)), np.float32)
            square[:h, (len(square) - w) // 2 :][:, :w] = near
            shapes.append(cv2.resize(square, (8, 8), interpolation=cv2.INTER_AREA).ravel())
            labels.append(label)
        return np.array(shapes), np.array(labels)

    model = KNeighborsClassifier(3).fit(*glyphs('train', 1000))
    assert model.score(*glyphs('val', 200)) > 0.9


def test_mmdet_reads_instances(data_root):
    dataset = build_dataset(
        'mmdet',
        {
            'type': 'CocoDataset',
            'data_root': str(data_root / 'coco'),
            'ann_file': 'annotations/instances_train2017.json',
            'data_prefix': {'img': 'train2017/'},
            'metainfo': {'classes': CLASSES, 'palette': PALETTE},
            'pipeline': [
                {'type': 'LoadImageFromFile'},
                {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
            ],
        },
    )
    assert len(dataset) == 12
    for index in range(len(dataset)):
        sample = dataset[index]
        scene = compose_scene(np.random.default_rng([0, 0, index]), load_source('train'), SIZE)
        assert sample['img'].shape == (SIZE, SIZE, 3)
        assert np.abs(sample['img'][..., ::-1].astype(int) - scene.image).mean() < 4
        assert np.array_equal(sample['gt_masks'].masks, scene.masks)
        assert np.array_equal(sample['gt_bboxes_labels'], scene.labels)
        assert not sample['gt_ignore_flags'].any()
        for box, mask in zip(sample['gt_bboxes'].tensor.numpy(), scene.masks):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_mmseg_reads_segments(data_root):
    dataset = build_dataset(
        'mmseg',
        {
            'type': 'BaseSegDataset',
            'reduce_zero_label': True,
            'data_root': str(data_root / 'ade'),
            'data_prefix': {'img_path': 'images/training', 'seg_map_path': 'annotations/training'},
            'metainfo': {'classes': SEG_CLASSES, 'palette': SEG_PALETTE},
            'pipeline': [
                {'type': 'LoadImageFromFile'},
                {'type': 'LoadAnnotations'},
            ],
        },
    )
    assert len(dataset) == 12
    for index in range(len(dataset)):
        segments = dataset[index]['gt_seg_map']
        scene = compose_scene(np.random.default_rng([0, 0, index]), load_source('train'), SIZE)
        expected = np.zeros((SIZE, SIZE), int)
        for mask, label in zip(scene.masks, scene.labels):
            expected[mask] = SEG_CLASSES.index(CLASSES[label])
        assert np.array_equal(segments, expected)


def test_mmdet_reads_panoptic_segments(data_root):
    metainfo = {
        'classes': (*CLASSES, 'photo'),
        'thing_classes': CLASSES,
        'stuff_classes': ('photo',),
        'palette': [*PALETTE, SEG_PALETTE[0]],
    }
    dataset = build_dataset(
        'mmdet',
        {
            'type': 'CocoPanopticDataset',
            'data_root': str(data_root / 'coco'),
            'ann_file': 'annotations/panoptic_train2017.json',
            'data_prefix': {'img': 'train2017/', 'seg': 'annotations/panoptic_train2017/'},
            'metainfo': metainfo,
        },
    )
    assert len(dataset) == 12
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        ids = cv2.imread(info['seg_map_path'])[..., ::-1] @ [1, 256, 65536]
        scene = compose_scene(np.random.default_rng([0, 0, index]), load_source('train'), SIZE)
        *things, photo = info['segments_info']
        assert [segment['category'] for segment in things] == scene.labels.tolist()
        assert all(np.array_equal(ids == segment['id'], mask) for segment, mask in zip(things, scene.masks))
        assert all(segment['is_thing'] for segment in things)
        assert (photo['category'], photo['is_thing']) == (len(CLASSES), 0)
        assert np.array_equal(ids == photo['id'], ~scene.masks.any(axis=0))
        assert [instance['bbox_label'] for instance in info['instances']] == scene.labels.tolist()


def test_mmpretrain_reads_classes(data_root):
    for split, number in (('train', 30), ('val', 20)):
        dataset = build_dataset(
            'mmpretrain',
            {
                'type': 'CustomDataset',
                'data_root': str(data_root / 'imagenet'),
                'data_prefix': split,
                'pipeline': [{'type': 'LoadImageFromFile'}],
            },
        )
        assert tuple(dataset.CLASSES) == CLASSES
        assert len(dataset) == number
        assert np.bincount([dataset[i]['gt_label'] for i in range(number)]).tolist() == [number // 10] * 10
        assert dataset[0]['img'].shape == (64, 64, 3)


def test_scenes_are_the_same_in_both_formats(data_root):
    for coco, ade in (('train2017', 'training'), ('val2017', 'validation')):
        assert contents(data_root / 'coco' / coco) == contents(data_root / 'ade' / 'images' / ade)


def test_json_is_what_coco_s_is(data_root):
    for split, number in (('train', 12), ('val', 4)):
        path = data_root / 'coco' / 'annotations' / f'instances_{split}2017.json'
        content = json.loads(path.read_text())
        assert [c['id'] for c in content['categories']] == list(range(1, 11))
        assert [c['name'] for c in content['categories']] == list(CLASSES)
        assert len(content['images']) == number
        ids = [a['id'] for a in content['annotations']]
        assert len(ids) == len(set(ids)) and min(ids) == 1
        for annotation in content['annotations']:
            assert annotation['iscrowd'] == 0
            assert annotation['area'] == photo_digits.coco_mask.area(annotation['segmentation'])
    meta = json.loads((data_root / 'meta.json').read_text())
    assert meta['settings']['num_cls_train'] == 30
    assert sum(meta['digits']['val'].values()) == len(content['annotations'])


def test_a_complete_folder_is_left_as_it_is(tmp_path):
    out = tmp_path / 'data'
    assert make_photo_digits(out, **SMALL)
    (out / 'mark').write_text('kept')
    assert not make_photo_digits(out, **SMALL)
    with pytest.raises(FileExistsError, match='size 48 instead of 50'):
        make_photo_digits(out, **{**SMALL, 'size': 50})
    assert (out / 'mark').is_file()
    assert make_photo_digits(out, **{**SMALL, 'size': 50}, overwrite=True)
    assert not (out / 'mark').exists()
    assert os.listdir(tmp_path) == ['data']


@pytest.mark.parametrize('kind', ['folder', 'file', 'json'])
def test_what_is_not_photo_digits_is_never_replaced(tmp_path, kind):
    out = tmp_path / 'data'
    if kind == 'file':
        out.write_text('mine')
    else:
        out.mkdir()
        (out / ('meta.json' if kind == 'json' else 'mine')).write_text('{}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match='is no PhotoDigits folder'):
        make_photo_digits(out, **SMALL, overwrite=True)
    assert contents(tmp_path) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(photo_digits, 'compose_crop', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_photo_digits(tmp_path / 'data', **SMALL)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ('name', 'value'),
    [('size', 31), ('cls_size', 16), ('num_train', 0), ('num_val', -1), ('seed', -1)],
)
def test_bad_settings_are_refused(tmp_path, name, value):
    with pytest.raises(SettingsError, match=f'{name} must be at least .*, got {value}'):
        make_photo_digits(tmp_path / 'data', **{**SMALL, name: value})
    assert not os.listdir(tmp_path)


def test_a_missing_photograph_is_named(monkeypatch):
    monkeypatch.setattr(photo_digits, 'PHOTOS', {'skimage.data': 'nowhere.png'})
    with pytest.raises(FileNotFoundError, match='skimage.data lacks nowhere.png'):
        load_source.__wrapped__('train')


def test_tool_makes_shows_and_repeats(tmp_path, run_tool):
    out = tmp_path / 'new' / 'data'
    args = ('--out', out, '--size', 40, '--num-train', 4, '--cls-size', 32, '--num-cls-train', 10)
    status, _, progress = run_tool(*args, '--show')
    assert status == 0
    assert 'PhotoDigits, train scenes: 100%' in progress
    picture = cv2.imread(str(out / 'samples.png'))[..., ::-1]
    assert picture.shape[1] == 1200
    assert (picture == SEG_PALETTE[0]).all(axis=2).sum() > 1000
    assert len(list((out / 'coco' / 'train2017').iterdir())) == 4
    status, output, _ = run_tool(*args)
    assert status == 0
    assert 'already there, with the same settings' in output


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--size', '16', '--num-train', '4'], 'size must be at least 32, got 16'),
        (['--num-train', '0'], 'num_train must be at least 1, got 0'),
        (['--num-train', 'many'], "argument --num-train: invalid int value: 'many'"),
        (['--num-train', '4', '--show', 'a.jpg'], 'ends in .png'),
        (['--num-train', '4', '--out', '{tmp}/file/data'], '/file/data: '),
    ],
    ids=['size', 'zero', 'word', 'show', 'unwritable'],
)
def test_tool_errors_are_one_line(tmp_path, run_tool, args, message):
    (tmp_path / 'file').touch()
    args = [arg.format(tmp=tmp_path) for arg in args]
    status, _, errors = run_tool('--out', tmp_path / 'data', *args)
    assert status == 2
    assert errors.startswith('photo_digits.py: error: ') and message in errors
    assert errors.count('\n') == 1
    assert os.listdir(tmp_path) == ['file']
