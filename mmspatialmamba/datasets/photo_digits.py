"""PhotoDigits: handwritten digits on photographs, made from what two Python packages ship.

The digits are the 1,797 scans of ``sklearn.datasets.load_digits``. The backgrounds are crops of the photographs inside
the scikit-learn and scikit-image packages. Nothing is downloaded. The same scenes are written in the formats of COCO
and ADE20K, and crops with one main digit in that of ImageNet.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

CLASSES = tuple('0123456789')
_COLOURS = 'e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4'
PALETTE = [tuple(bytes.fromhex(colour)) for colour in _COLOURS.split()]
SEG_CLASSES = ('photo', *CLASSES)
SEG_PALETTE = [(96, 96, 96), *PALETTE]
PHOTOS = {
    'sklearn.datasets.images': 'china.jpg flower.jpg',
    'skimage.data': 'astronaut.png brick.png camera.png chelsea.png coffee.png grass.png gravel.png '
    'motorcycle_left.png rocket.jpg',
}
ADE_SPLITS = {'train': 'training', 'val': 'validation'}
MIN_SIZE = 32
MAX_OCCLUSION = 0.35
MIN_CONTRAST = 0.5

# Raise it when the composition changes: a folder made by an older one is not equal.
_REVISION = 2
_LEVEL = 10
_TRIES = 12
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class SettingsError(ValueError):
    """A size, a number or a seed that no data set can have."""


class Scene(NamedTuple):
    """A composed image and its annotations.

    Attributes:
        image (np.ndarray): uint8 RGB of shape (size, size, 3).
        masks (np.ndarray): bool of shape (n, size, size), the visible part of each digit. Masks are disjoint. The thin
            outline around a digit belongs to none.
        labels (np.ndarray): int64 of shape (n,), the digits.
        occlusion (np.ndarray): float64 of shape (n,), the hidden share of each digit, 0 to 1. What lies outside the
            image counts as hidden.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    occlusion: np.ndarray


@cache
def load_source(split: str) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Load scans and photographs of a split.

    Training scenes draw 1,300 of the scans, validation scenes the other 497, stratified by class. Training scenes see
    the left two thirds of every photograph, validation scenes the right third.

    Args:
        split (str): 'train' or 'val'.

    Returns:
        tuple[list[list[np.ndarray]], list[np.ndarray]]: For each of the ten classes its scans, enlarged: float32 of
        shape (96, 96), the digit where they exceed 10. And the photographs: uint8 RGB of shape (height, width, 3).

    Raises:
        FileNotFoundError: If an installed package lacks a photograph.
    """
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=497, stratify=labels, random_state=0)
    part = np.sort(parts[split == 'val'])
    scans = [[_enlarge(images[i].reshape(8, 8)) for i in part[labels[part] == label]] for label in range(len(CLASSES))]
    photos = []
    for package, names in PHOTOS.items():
        for path in map(files(package).joinpath, names.split()):
            if not path.is_file():
                raise FileNotFoundError(f'{package} lacks {path.name}: reinstall scikit-learn and scikit-image')
            photo = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
            photos.append(np.split(photo, [photo.shape[1] * 2 // 3], axis=1)[split == 'val'])
    return scans, photos


def _enlarge(grey: np.ndarray) -> np.ndarray:
    """Enlarge an 8x8 scan after sharpening it, which keeps the holes of small loops open."""
    grey = np.pad(grey.astype(np.float32), 2)
    grey = cv2.addWeighted(grey, 3, cv2.GaussianBlur(grey, (0, 0), 1.2), -2, 0)
    return cv2.GaussianBlur(cv2.resize(grey, (96, 96), interpolation=cv2.INTER_CUBIC), (0, 0), 2)


def _random_background(rng: np.random.Generator, photos: list[np.ndarray], size: int) -> np.ndarray:
    """Cut a random square out of a random photograph: float32 RGB in [0, 1] of shape (size, size, 3).

    It is exposed darkly or brightly (a mean luma of 0.15 to 0.38 or 0.62 to 0.85), with a standard deviation of luma of
    at most 0.13, so that many colours stand out against all of it.
    """
    photo = _choose(rng, photos)
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(0.4, 1))
    top, left = rng.integers((height - side + 1, width - side + 1))
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    filter_ = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    crop = cv2.resize(crop, (size, size), interpolation=filter_).astype(np.float32) / 255
    luma = crop @ _LUMA
    level = rng.uniform(0.15, 0.38)
    if rng.random() < 0.5:
        crop = crop * np.float32(level / max(luma.mean(), level))
    else:
        crop = 1 - (1 - crop) * np.float32(level / max(1 - luma.mean(), level))
    mean = crop.mean(axis=(0, 1))
    factor = min(1.0, 0.13 / max(float((crop @ _LUMA).std()), 1e-6))
    return np.clip(mean + (crop - mean) * np.float32(factor), 0, 1)


def _render_digit(rng: np.random.Generator, scan: np.ndarray, length: float, margin: int) -> np.ndarray:
    """Draw a scan as a crisp shape, slightly rotated, sheared and stretched.

    ``length`` is the longer side of the drawn digit's box in pixels. The result is its opacity, float32 in [0, 1]: the
    box of the pixels above 0.5 and a margin around it.
    """
    hull = cv2.convexHull(cv2.findNonZero((scan > _LEVEL).view(np.uint8))).reshape(-1, 2)
    degrees, shear, aspect = rng.uniform((-12, -0.12, 0.85), (12, 0.12, 1.15))
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rotation = np.array([[cos, -sin], [sin, cos]])
    matrix = rotation @ np.array([[aspect, shear], [0, 1]])
    matrix *= length / np.ptp(hull @ matrix.T, axis=0).max()
    points = hull @ matrix.T
    offset = margin + 3 - points.min(axis=0)
    patch_size = np.ceil(points.max(axis=0) + offset + margin + 3).astype(int).tolist()
    field = cv2.warpAffine(scan, np.column_stack([matrix, offset]), patch_size)
    slope = np.hypot(cv2.Sobel(field, -1, 1, 0, scale=1 / 8), cv2.Sobel(field, -1, 0, 1, scale=1 / 8))
    alpha = np.clip(0.5 + (field - _LEVEL) / np.maximum(slope, 0.05), 0, 1)
    left, top, width, height = cv2.boundingRect((alpha > 0.5).view(np.uint8))
    return alpha[top - margin : top + height + margin, left - margin : left + width + margin]


class _Canvas:
    """An image that is composed layer by layer, and the digits on it."""

    def __init__(self, rng: np.random.Generator, photos: list[np.ndarray], size: int) -> None:
        self.rng = rng
        self.size = size
        self.background = _random_background(rng, photos, size)
        self.image = self.background.copy()
        # 0 for the photograph and outlines, else the digit's number from 1.
        self.parts = np.zeros((size, size), np.uint8)
        self.labels, self.areas, self.boxes, self.colours = [], [], [], []

    def add_digit(self, length: float, scan: np.ndarray, label: int, may_cover=False, at_border=False) -> bool:
        """Draw a digit on top, inside or across the border, unless it would hide too much; return whether it did."""
        rng, size, margin = self.rng, self.size, max(1, round(length / 40))
        alpha = _render_digit(rng, scan, length, margin)
        if at_border:
            corner = [int(rng.integers(-side // 2, size - side // 2)) for side in alpha.shape]
            axis = rng.integers(2)
            outside = round(alpha.shape[axis] * rng.uniform(0.4, 0.7))
            corner[axis] = -outside if rng.random() < 0.5 else size - alpha.shape[axis] + outside
        else:
            corner = [int(rng.integers(-margin, size - side + margin + 1)) for side in alpha.shape]
        box = np.array([*corner, *alpha.shape], float)
        overlaps = coco_mask.iou(box[None], np.array(self.boxes), [0] * len(self.boxes)) if self.boxes else 0
        if np.max(overlaps) > (0.3 if may_cover else 0):
            return False

        (y, x), (height, width) = corner, alpha.shape
        window = np.s_[max(y, 0) : y + height, max(x, 0) : x + width]
        full = cv2.warpAffine(alpha, np.float32([[1, 0, x], [0, 1, y]]), (size, size), flags=cv2.INTER_NEAREST)
        outline = cv2.dilate(full, _disc(margin))
        cover = outline > 0.5
        mask, area = full > 0.5, int((alpha > 0.5).sum())
        if mask.sum() < 0.2 * area or not self._hide(cover):
            return False

        near = cv2.dilate(cover.view(np.uint8), _disc(2 + 2 * margin)).view(bool) & ~cover
        photo = near & (self.parts == 0)
        local = float((self.image[photo if photo.any() else near] @ _LUMA).mean())
        colour = _contrasting_colour(rng, local, self.colours)
        rim = np.float32(0.05 if colour @ _LUMA > local else 0.95)
        part = self.image[window]
        part += outline[window][..., None] * (rim - part)
        part += full[window][..., None] * (colour - part)
        self.labels.append(label)
        self.areas.append(area)
        self.boxes.append(box)
        self.colours.append(colour)
        self.parts[mask] = len(self.labels)
        return True

    def finish(self) -> Scene:
        """Lay a small piece of the photograph, from somewhere else in it, on some digits; return the scene."""
        rng, size = self.rng, self.size
        for number in range(1, len(self.labels) + 1):
            if rng.random() < 0.08:
                sides = np.array([round(size * side) for side in rng.uniform(0.06, 0.14, 2)])
                centre = _choose(rng, np.argwhere(self.parts == number))
                top, left = np.clip(centre - sides // 2, 0, size - sides)
                y, x = rng.integers(size - sides + 1)
                height, width = sides
                cover = np.zeros((size, size), bool)
                cover[top : top + height, left : left + width] = True
                if self._hide(cover):
                    self.image[cover] = self.background[y : y + height, x : x + width].reshape(-1, 3)
        masks = self.parts == np.arange(1, len(self.labels) + 1)[:, None, None]
        occlusion = 1 - masks.sum(axis=(1, 2)) / self.areas
        return Scene(np.rint(self.image * 255).astype(np.uint8), masks, np.array(self.labels), occlusion)

    def _hide(self, cover: np.ndarray) -> bool:
        """Take ``cover`` off the digits, unless that hides too much of one; return whether it did."""
        left = np.where(cover, 0, self.parts).astype(np.uint8)
        for number, area in enumerate(self.areas, start=1):
            if (left == number).sum() < min((self.parts == number).sum(), (1 - MAX_OCCLUSION) * area):
                return False
        self.parts = left
        return True


def _choose(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _contrasting_colour(rng: np.random.Generator, luma: float, others: list[np.ndarray]) -> np.ndarray:
    """Draw a colour whose luma differs by ``MIN_CONTRAST`` or more, vivid and unlike the others."""
    hue, saturation, value = rng.uniform((0, 0.3, 0), (360, 1, 1), (64, 3)).astype(np.float32).T
    colours = cv2.cvtColor(np.dstack([hue, saturation, value]), cv2.COLOR_HSV2RGB)[0]
    candidates = colours[np.abs(colours @ _LUMA - luma) >= MIN_CONTRAST][:6]
    if not len(candidates):
        return np.full(3, 0 if luma > 0.5 else 1, np.float32)
    distances = [np.linalg.norm(candidates - other, axis=1) for other in others]
    return candidates[np.min([np.ptp(candidates, axis=1), *distances], axis=0).argmax()]


def compose_scene(rng: np.random.Generator, source: tuple, size: int) -> Scene:
    """Compose a scene of 1 to 5 digits for detection and segmentation.

    The longer side of a digit is 22 to 50 % of the image's, and it lies wholly inside. Another digit or a small piece
    of the photograph covers at most 35 % of it.

    Args:
        rng (np.random.Generator): Source of randomness.
        source (tuple): Scans and photographs to choose from, of :func:`load_source`.
        size (int): Side of the image in pixels.

    Returns:
        Scene: The image with masks and labels of its digits.
    """
    scans, photos = source
    canvas = _Canvas(rng, photos, size)
    for _ in range(rng.choice([1, 2, 3, 4, 5], p=[0.1, 0.2, 0.3, 0.25, 0.15])):
        label = int(rng.integers(len(CLASSES)))
        scan = _choose(rng, scans[label])
        may_cover = rng.random() < 0.35
        any(canvas.add_digit(size * rng.uniform(0.22, 0.5), scan, label, may_cover) for _ in range(_TRIES))
    return canvas.finish()


def compose_crop(rng: np.random.Generator, source: tuple, size: int, label: int) -> Scene:
    """Compose an image with one main digit for classification.

    The longer side of the main digit is 55 to 90 % of the image's, and it lies wholly inside. A smaller digit at the
    border or a small piece of the photograph covers at most 35 % of it.

    Args:
        rng (np.random.Generator): Source of randomness.
        source (tuple): Scans and photographs to choose from, of :func:`load_source`.
        size (int): Side of the image in pixels.
        label (int): The main digit, 0 to 9.

    Returns:
        Scene: The image. Its first digit is the main one, the second, if any, the one at the border.
    """
    scans, photos = source
    canvas = _Canvas(rng, photos, size)
    canvas.add_digit(size * rng.uniform(0.55, 0.9), _choose(rng, scans[label]), label)
    if rng.random() < 0.25:
        other = int(rng.integers(len(CLASSES)))
        scan = _choose(rng, scans[other])
        any(canvas.add_digit(size * rng.uniform(0.35, 0.6), scan, other, True, at_border=True) for _ in range(_TRIES))
    return canvas.finish()


def make_photo_digits(
    out: str | os.PathLike,
    size: int,
    num_train: int,
    num_val: int | None = None,
    cls_size: int = 64,
    num_cls_train: int | None = None,
    num_cls_val: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> bool:
    """Write PhotoDigits in the formats of COCO, ADE20K and ImageNet.

    An image depends on the seed, its size, its split and its index only, not on how many there are. With equal library
    versions a seed fixes every byte. The folder appears complete or not at all::

        out/coco/{train,val}2017/*.jpg, coco/annotations/instances_{train,val}2017.json
        out/coco/annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/*.png
        out/ade/images/{training,validation}/*.jpg, ade/annotations/{training,validation}/*.png
        out/imagenet/{train,val}/{0..9}/*.jpg
        out/meta.json

    COCO's category ids are 1 to 10, and in its panoptic format 11 for the photograph, the only stuff; its segmentations
    are compressed RLE of the visible parts. ADE20K's values are 1 for the photograph and 2 to 11 for the digits; 0, its
    unlabelled value, is not used.

    Args:
        out (str | os.PathLike): Folder to create.
        size (int): Side of a scene in pixels, at least 32.
        num_train (int): Number of training scenes.
        num_val (int, optional): Number of validation scenes. Defaults to a quarter of ``num_train``.
        cls_size (int): Side of a classification image in pixels, at least 32. Defaults to 64.
        num_cls_train, num_cls_val (int, optional): Numbers of crops. Default to four times those of scenes.
        seed (int): Not negative. Defaults to 0.
        overwrite (bool): Replace a PhotoDigits folder of other settings. Defaults to False.
        progress (bool): Show progress bars. Defaults to False.

    Returns:
        bool: True if the data set was written, False if ``out`` holds it already.

    Raises:
        SettingsError: If a size is below 32, a number below 1 or the seed negative.
        FileExistsError: If ``out`` is something else than an equal PhotoDigits folder, and not one of other settings
            that ``overwrite`` allows to replace.
        OSError: If ``out`` cannot be written.
    """
    num_val = max(1, num_train // 4) if num_val is None else num_val
    num_cls_train = 4 * num_train if num_cls_train is None else num_cls_train
    num_cls_val = 4 * num_val if num_cls_val is None else num_cls_val
    settings = dict(revision=_REVISION, size=size, num_train=num_train, num_val=num_val, cls_size=cls_size)
    settings.update(num_cls_train=num_cls_train, num_cls_val=num_cls_val, seed=seed)
    for name, value in settings.items():
        least = MIN_SIZE if name.endswith('size') else 0 if name == 'seed' else 1
        if value < least:
            raise SettingsError(f'{name} must be at least {least}, got {value}')

    out = Path(os.path.abspath(out))
    if _holds(out, settings, overwrite):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temporary:
        fresh = Path(temporary, 'fresh')
        _write(fresh, settings, partial(tqdm, unit='image', mininterval=1, disable=not progress))
        if out.exists():
            out.rename(Path(temporary, 'replaced'))
        fresh.rename(out)
    return True


def _holds(out: Path, settings: dict, overwrite: bool) -> bool:
    """Return whether ``out`` holds this data set; raise if something else is in the way."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        present = json.loads((out / 'meta.json').read_text())['settings']
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError) as error:
        raise FileExistsError(f'{out} exists and is no PhotoDigits folder: choose another or remove it') from error
    differing = {name: value for name, value in settings.items() if present.get(name) != value}
    if differing and not overwrite:
        changes = ', '.join(f'{name} {present.get(name)} instead of {value}' for name, value in differing.items())
        raise FileExistsError(
            f'{out} holds PhotoDigits of other settings ({changes}): '
            'choose another folder or replace it with --overwrite (overwrite=True)'
        )
    return not differing


def _write(root: Path, settings: dict, progress: partial) -> None:
    counts = {}
    for code, split in enumerate(ADE_SPLITS):
        counts[split] = _write_scenes(root, settings, code, split, progress)
        for name in CLASSES:
            (root / 'imagenet' / split / name).mkdir(parents=True)
        for index in progress(range(settings[f'num_cls_{split}']), f'PhotoDigits, {split} crops'):
            rng = np.random.default_rng([settings['seed'], len(ADE_SPLITS) + code, index])
            label = index % len(CLASSES)
            crop = compose_crop(rng, load_source(split), settings['cls_size'], label)
            _save(crop.image, root / 'imagenet' / split / CLASSES[label] / f'{index + 1:08d}.jpg')
    photographs = ' '.join(PHOTOS.values()).split()
    versions = {name: version(name) for name in ('numpy', 'pycocotools', 'scikit-image', 'scikit-learn')}
    versions['opencv'] = cv2.__version__
    meta = dict(settings=settings, digits=counts, classes=CLASSES, photographs=photographs, versions=versions)
    (root / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')


def _write_scenes(root: Path, settings: dict, code: int, split: str, progress: partial) -> dict[str, int]:
    """Write the scenes of a split; count the digits of each class."""
    size, source, coco, ade = settings['size'], load_source(split), root / 'coco', root / 'ade'
    images, instances, panoptic = [], [], []
    for index in progress(range(settings[f'num_{split}']), f'PhotoDigits, {split} scenes'):
        scene = compose_scene(np.random.default_rng([settings['seed'], code, index]), source, size)
        stem, image_id = f'{index + 1:012d}', index + 1
        images.append({'id': image_id, 'file_name': f'{stem}.jpg', 'height': size, 'width': size})
        classes, parts, segments = np.zeros((size, size), np.uint8), np.zeros((size, size, 3), np.uint8), []
        masks, categories = [*scene.masks, ~scene.masks.any(axis=0)], [*(scene.labels + 1).tolist(), len(SEG_CLASSES)]
        for number, (mask, category) in enumerate(zip(masks, categories), start=1):
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            box, area = coco_mask.toBbox(rle).tolist(), int(coco_mask.area(rle))
            info = {'category_id': category, 'bbox': box, 'area': area, 'iscrowd': 0}
            segments.append({'id': number, **info})
            if category < len(SEG_CLASSES):
                counts = {'size': rle['size'], 'counts': rle['counts'].decode('ascii')}
                instances.append({'id': len(instances) + 1, 'image_id': image_id, **info, 'segmentation': counts})
            # In ADE20K's format the photograph comes first; an id is red + 256 * green + 65536 * blue.
            classes[mask] = category % len(SEG_CLASSES) + 1
            parts[mask, 0] = number
        panoptic.append({'image_id': image_id, 'file_name': f'{stem}.png', 'segments_info': segments})
        _save(scene.image, coco / f'{split}2017' / f'{stem}.jpg', ade / 'images' / ADE_SPLITS[split] / f'{stem}.jpg')
        _save(classes, ade / 'annotations' / ADE_SPLITS[split] / f'{stem}.png')
        _save(parts, coco / 'annotations' / f'panoptic_{split}2017' / f'{stem}.png')

    things = [{'id': index + 1, 'name': name, 'supercategory': 'digit'} for index, name in enumerate(CLASSES)]
    kinds = [{**thing, 'isthing': 1, 'color': color} for thing, color in zip(things, PALETTE)]
    stuff = dict(id=len(SEG_CLASSES), name=SEG_CLASSES[0], supercategory='background', isthing=0, color=SEG_PALETTE[0])
    for name, records, categories in (('instances', instances, things), ('panoptic', panoptic, [*kinds, stuff])):
        content = dict(info=dict(description='PhotoDigits'), images=images, annotations=records, categories=categories)
        (coco / 'annotations' / f'{name}_{split}2017.json').write_text(json.dumps(content))
    return {thing['name']: sum(digit['category_id'] == thing['id'] for digit in instances) for thing in things}


def _save(image: np.ndarray, *paths: Path) -> None:
    """Encode an RGB or grey image once, and write it to files of one type."""
    data = cv2.imencode(paths[0].suffix, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
