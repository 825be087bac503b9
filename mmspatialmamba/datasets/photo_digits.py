"""PhotoDigits: handwritten digits on photographs, made from what two Python packages ship.

The digits are the 1,797 scans of ``sklearn.datasets.load_digits``, the backgrounds are crops of the
photographs inside the scikit-learn and scikit-image packages. Nothing is downloaded. The same
scenes are written in COCO's and in ADE20K's format, and crops with one main digit in ImageNet's.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

CLASSES = tuple('0123456789')
PALETTE = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (67, 99, 216),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (191, 239, 69),
    (250, 190, 212),
]
SEG_CLASSES = ('photo', *CLASSES)
SEG_PALETTE = [(96, 96, 96), *PALETTE]

PHOTOS = (
    ('sklearn.datasets.images', 'china.jpg'),
    ('sklearn.datasets.images', 'flower.jpg'),
    ('skimage.data', 'astronaut.png'),
    ('skimage.data', 'brick.png'),
    ('skimage.data', 'camera.png'),
    ('skimage.data', 'chelsea.png'),
    ('skimage.data', 'coffee.png'),
    ('skimage.data', 'grass.png'),
    ('skimage.data', 'gravel.png'),
    ('skimage.data', 'motorcycle_left.png'),
    ('skimage.data', 'rocket.jpg'),
)
SPLITS = ('train', 'val')
MIN_SIZE = 32
MAX_OCCLUSION = 0.35
MIN_CONTRAST = 0.5

# Raise it when the composition changes: a folder made by an older one is not equal.
_REVISION = 2
_META = 'meta.json'
_NUM_VAL_SCANS = 497
_UPSCALE = 8
_PAD = 2
_LEVEL = 10
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class SettingsError(ValueError):
    """A size, a number or a seed that no data set can have."""


@dataclass(frozen=True)
class Scan:
    """A scanned digit, enlarged smoothly.

    Attributes:
        field (np.ndarray): float32 of shape (96, 96). The digit is where it exceeds the level of
            10.
        hull (np.ndarray): int32 of shape (n, 2), corners (x, y) of the digit's convex hull.
    """

    field: np.ndarray
    hull: np.ndarray


@dataclass(frozen=True)
class Source:
    """What scenes of one split are composed of.

    Attributes:
        scans (tuple[tuple[Scan, ...], ...]): For each of the ten classes its scans.
        photos (tuple[np.ndarray, ...]): Photographs, uint8 RGB of shape (height, width, 3).
    """

    scans: tuple[tuple[Scan, ...], ...]
    photos: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Scene:
    """A composed image and what is known about it.

    Attributes:
        image (np.ndarray): uint8 RGB of shape (size, size, 3).
        masks (np.ndarray): bool of shape (n, size, size), the visible part of each digit. Masks are
            disjoint; the thin outline around a digit belongs to none.
        labels (np.ndarray): int64 of shape (n,), the digits.
        occlusion (np.ndarray): float64 of shape (n,), the hidden share of each digit, 0 to 1. What
            lies outside the image counts as hidden.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    occlusion: np.ndarray


def split_scans() -> dict[str, np.ndarray]:
    """Divide the scans of ``load_digits`` into two fixed sets, stratified by class.

    Returns:
        dict[str, np.ndarray]: For 'train' and 'val' the indices of its scans (1,300 and 497).
    """
    target = load_digits().target
    train, val = train_test_split(np.arange(len(target)), test_size=_NUM_VAL_SCANS, stratify=target, random_state=0)
    return {'train': np.sort(train), 'val': np.sort(val)}


@cache
def load_source(split: str) -> Source:
    """Load scans and photographs of a split.

    Training scenes see the left two thirds of every photograph, validation scenes the right third.

    Args:
        split (str): 'train' or 'val'.

    Returns:
        Source: The split's scans and photographs.

    Raises:
        FileNotFoundError: If an installed package lacks a photograph.
    """
    digits = load_digits()
    scans = [[] for _ in CLASSES]
    for index in split_scans()[split]:
        scans[digits.target[index]].append(_enlarge(digits.images[index]))
    photos = []
    for package, name in PHOTOS:
        path = files(package) / name
        if not path.is_file():
            raise FileNotFoundError(f'{package} lacks its photograph {name}: reinstall scikit-learn and scikit-image')
        photo = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        border = photo.shape[1] * 2 // 3
        photos.append(photo[:, :border] if split == 'train' else photo[:, border:])
    return Source(tuple(tuple(of_class) for of_class in scans), tuple(photos))


def _enlarge(grey: np.ndarray) -> Scan:
    """Enlarge an 8x8 scan after sharpening it, which keeps the holes of small loops open."""
    grey = np.pad(grey.astype(np.float32), _PAD)
    grey = cv2.addWeighted(grey, 3, cv2.GaussianBlur(grey, (0, 0), 1.2), -2, 0)
    field = cv2.resize(grey, None, fx=_UPSCALE, fy=_UPSCALE, interpolation=cv2.INTER_CUBIC)
    field = cv2.GaussianBlur(field, (0, 0), _UPSCALE / 4)
    hull = cv2.convexHull(cv2.findNonZero((field > _LEVEL).view(np.uint8)))
    return Scan(field, hull.reshape(-1, 2))


def random_background(rng: np.random.Generator, source: Source, size: int) -> np.ndarray:
    """Cut a random square out of a random photograph.

    It is exposed darkly or brightly (a mean luma of 0.15 to 0.38 or 0.62 to 0.85) and its contrast
    lowered to a standard deviation of luma of at most 0.13, so that many colours stand out against
    all of it.

    Args:
        rng (np.random.Generator): Source of randomness.
        source (Source): Photographs to choose from.
        size (int): Side of the result in pixels.

    Returns:
        np.ndarray: float32 RGB in [0, 1] of shape (size, size, 3).
    """
    photo = source.photos[rng.integers(len(source.photos))]
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(0.4, 1))
    top = rng.integers(height - side + 1)
    left = rng.integers(width - side + 1)
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


def render_digit(rng: np.random.Generator, scan: Scan, length: float) -> np.ndarray:
    """Draw a scan as a crisp shape, slightly rotated, sheared and stretched.

    Args:
        rng (np.random.Generator): Source of randomness.
        scan (Scan): The digit.
        length (float): The longer side of the drawn digit's box in pixels; mostly its height.

    Returns:
        np.ndarray: Opacity, float32 in [0, 1]: the box of the pixels above 0.5 and a margin around
            it, of the width that :func:`outline_width` gives.
    """
    angle = np.deg2rad(rng.uniform(-12, 12))
    shear = rng.uniform(-0.12, 0.12)
    aspect = rng.uniform(0.85, 1.15)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[aspect, shear], [0, 1]])
    matrix *= length / np.ptp(scan.hull @ matrix.T, axis=0).max()
    points = scan.hull @ matrix.T
    margin = outline_width(length) + 3
    offset = margin - points.min(axis=0)
    patch_size = np.ceil(points.max(axis=0) + offset + margin).astype(int).tolist()
    field = cv2.warpAffine(scan.field, np.column_stack([matrix, offset]), patch_size)
    slope = np.hypot(cv2.Sobel(field, -1, 1, 0, scale=1 / 8), cv2.Sobel(field, -1, 0, 1, scale=1 / 8))
    alpha = np.clip(0.5 + (field - _LEVEL) / np.maximum(slope, 0.05), 0, 1)
    left, top, width, height = cv2.boundingRect((alpha > 0.5).view(np.uint8))
    margin = outline_width(length)
    return alpha[top - margin : top + height + margin, left - margin : left + width + margin]


def outline_width(length: float) -> int:
    """Width of the outline around a digit.

    Args:
        length (float): The longer side of the digit's box in pixels.

    Returns:
        int: Width in pixels, at least 1.
    """
    return max(1, round(length / 40))


def compose_scene(rng: np.random.Generator, source: Source, size: int) -> Scene:
    """Compose a scene of 1 to 5 digits for detection and segmentation.

    The longer side of a digit is 22 to 50 % of the image's, and it lies wholly inside. Some digits
    are partly covered by another or by a small piece of the photograph, at most by 35 %.

    Args:
        rng (np.random.Generator): Source of randomness.
        source (Source): Scans and photographs to choose from.
        size (int): Side of the image in pixels.

    Returns:
        Scene: The image with masks and labels of its digits.
    """
    canvas = _Canvas(random_background(rng, source, size))
    for _ in range(rng.choice([1, 2, 3, 4, 5], p=[0.1, 0.2, 0.3, 0.25, 0.15])):
        label = int(rng.integers(len(CLASSES)))
        scan = _choose(rng, source.scans[label])
        may_cover = rng.random() < 0.35
        for _ in range(12):
            length = size * rng.uniform(0.22, 0.5)
            alpha = render_digit(rng, scan, length)
            width = outline_width(length)
            corner = [int(rng.integers(-width, size - side + width + 1)) for side in alpha.shape]
            if canvas.add_digit(rng, alpha, width, corner, label, may_cover):
                break
    _add_patches(rng, canvas)
    return canvas.scene()


def compose_crop(rng: np.random.Generator, source: Source, size: int, label: int) -> Scene:
    """Compose an image with one main digit for classification.

    The longer side of the main digit is 55 to 90 % of the image's, and it lies wholly inside.
    Sometimes a smaller digit enters at the border, or a small piece of the photograph covers a
    part; at most 35 % of the main digit are covered.

    Args:
        rng (np.random.Generator): Source of randomness.
        source (Source): Scans and photographs to choose from.
        size (int): Side of the image in pixels.
        label (int): The main digit, 0 to 9.

    Returns:
        Scene: The image. Its first digit is the main one, the second, if any, the one at the
            border.
    """
    canvas = _Canvas(random_background(rng, source, size))
    length = size * rng.uniform(0.55, 0.9)
    alpha = render_digit(rng, _choose(rng, source.scans[label]), length)
    width = outline_width(length)
    corner = [int(rng.integers(-width, size - side + width + 1)) for side in alpha.shape]
    canvas.add_digit(rng, alpha, width, corner, label)
    if rng.random() < 0.25:
        other = int(rng.integers(len(CLASSES)))
        scan = _choose(rng, source.scans[other])
        for _ in range(12):
            length = size * rng.uniform(0.35, 0.6)
            alpha = render_digit(rng, scan, length)
            corner = [int(rng.integers(-side // 2, size - side // 2)) for side in alpha.shape]
            axis = rng.integers(2)
            outside = round(alpha.shape[axis] * rng.uniform(0.4, 0.7))
            corner[axis] = -outside if rng.random() < 0.5 else size - alpha.shape[axis] + outside
            if canvas.add_digit(rng, alpha, outline_width(length), corner, other, may_cover=True):
                break
    _add_patches(rng, canvas)
    return canvas.scene()


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

    An image depends on the seed, its size, its split and its index only, not on how many there
    are. With equal library versions a seed fixes every byte. The folder appears complete or not at
    all::

        out/coco/{train,val}2017/*.jpg, coco/annotations/instances_{train,val}2017.json
        out/coco/annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/*.png
        out/ade/images/{training,validation}/*.jpg, ade/annotations/{training,validation}/*.png
        out/imagenet/{train,val}/{0..9}/*.jpg
        out/meta.json

    COCO's category ids are 1 to 10, and in its panoptic format 11 for the photograph, the only stuff;
    its segmentations are compressed RLE of the visible parts.
    ADE20K's values are 1 for the photograph and 2 to 11 for the digits; 0, its unlabelled value,
    is not used.

    Args:
        out (str | os.PathLike): Folder to create.
        size (int): Side of a scene in pixels, at least 32.
        num_train (int): Number of training scenes.
        num_val (int, optional): Number of validation scenes. Defaults to a quarter of
            ``num_train``.
        cls_size (int): Side of a classification image in pixels, at least 32. Defaults to 64.
        num_cls_train (int, optional): Number of training images for classification. Defaults to
            four times ``num_train``.
        num_cls_val (int, optional): Number of validation images for classification. Defaults to
            four times ``num_val``.
        seed (int): Not negative. Defaults to 0.
        overwrite (bool): Replace a PhotoDigits folder of other settings. Defaults to False.
        progress (bool): Show a progress bar. Defaults to False.

    Returns:
        bool: True if the data set was written, False if ``out`` holds it already.

    Raises:
        SettingsError: If a size is below 32, a number below 1 or the seed negative.
        FileExistsError: If ``out`` is something else than an equal PhotoDigits folder, and not one
            of other settings that ``overwrite`` allows to replace.
        OSError: If ``out`` cannot be written.
    """
    num_val = max(1, num_train // 4) if num_val is None else num_val
    settings = {
        'revision': _REVISION,
        'size': size,
        'num_train': num_train,
        'num_val': num_val,
        'cls_size': cls_size,
        'num_cls_train': 4 * num_train if num_cls_train is None else num_cls_train,
        'num_cls_val': 4 * num_val if num_cls_val is None else num_cls_val,
        'seed': seed,
    }
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
        _write(fresh, settings, progress)
        if out.exists():
            out.rename(Path(temporary, 'replaced'))
        fresh.rename(out)
    return True


def _holds(out: Path, settings: dict, overwrite: bool) -> bool:
    """Tell whether ``out`` holds this data set; raise if something else is in the way."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        present = json.loads((out / _META).read_text())['settings']
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError) as error:
        raise FileExistsError(f'{out} exists and is no PhotoDigits folder: choose another or remove it') from error
    if present == settings:
        return True
    if not overwrite:
        differing = ', '.join(
            f'{name} {present.get(name)} instead of {value}'
            for name, value in settings.items()
            if present.get(name) != value
        )
        raise FileExistsError(
            f'{out} holds PhotoDigits of other settings ({differing}): '
            'choose another folder or replace it with --overwrite (overwrite=True)'
        )
    return False


def _write(root: Path, settings: dict, progress: bool) -> None:
    total = sum(value for name, value in settings.items() if name.startswith('num_'))
    counts = {}
    with tqdm(total=total, desc='PhotoDigits', unit='image', mininterval=1, disable=not progress) as bar:
        for code, split in enumerate(SPLITS):
            counts[split] = _write_scenes(root, settings, code, split, bar)
            _write_crops(root, settings, code + len(SPLITS), split, bar)
    versions = {name: version(name) for name in ('numpy', 'pycocotools', 'scikit-image', 'scikit-learn')}
    meta = {
        'settings': settings,
        'digits': counts,
        'classes': CLASSES,
        'photographs': [name for _, name in PHOTOS],
        'versions': {**versions, 'opencv': cv2.__version__},
    }
    (root / _META).write_text(json.dumps(meta, indent=2) + '\n')


def _write_scenes(root: Path, settings: dict, code: int, split: str, bar: tqdm) -> dict[str, int]:
    """Write the scenes of a split; count the digits of each class."""
    size, source = settings['size'], load_source(split)
    coco_images = root / 'coco' / f'{split}2017'
    coco_annotations = root / 'coco' / 'annotations'
    coco_panoptic = coco_annotations / f'panoptic_{split}2017'
    ade_split = {'train': 'training', 'val': 'validation'}[split]
    ade_images = root / 'ade' / 'images' / ade_split
    ade_annotations = root / 'ade' / 'annotations' / ade_split
    for folder in (coco_images, coco_panoptic, ade_images, ade_annotations):
        folder.mkdir(parents=True, exist_ok=True)

    images, annotations, panoptic = [], [], []
    counts = dict.fromkeys(CLASSES, 0)
    for index in range(settings[f'num_{split}']):
        scene = compose_scene(np.random.default_rng([settings['seed'], code, index]), source, size)
        stem = f'{index + 1:012d}'
        jpeg = _encode_jpeg(scene.image)
        (coco_images / f'{stem}.jpg').write_bytes(jpeg)
        (ade_images / f'{stem}.jpg').write_bytes(jpeg)
        images.append({'id': index + 1, 'file_name': f'{stem}.jpg', 'height': size, 'width': size})
        classes = np.ones((size, size), np.uint8)
        parts = np.zeros((size, size), np.uint8)
        infos = []
        for number, (mask, label) in enumerate(zip(scene.masks, scene.labels.tolist()), start=1):
            classes[mask] = label + 2
            parts[mask] = number
            info, rle = _describe(mask, label + 1)
            infos.append({'id': number, **info})
            annotations.append({'id': len(annotations) + 1, 'image_id': index + 1, **info, 'segmentation': rle})
            counts[CLASSES[label]] += 1
        infos.append({'id': len(infos) + 1, **_describe(parts == 0, len(CLASSES) + 1)[0]})
        parts[parts == 0] = len(infos)
        panoptic.append({'image_id': index + 1, 'file_name': f'{stem}.png', 'segments_info': infos})
        (ade_annotations / f'{stem}.png').write_bytes(_encode_png(classes))
        # An id is red + 256 * green + 65536 * blue; OpenCV's order is blue, green, red.
        (coco_panoptic / f'{stem}.png').write_bytes(_encode_png(np.dstack([0 * parts, 0 * parts, parts])))
        bar.update()

    things = [{'id': index + 1, 'name': name, 'supercategory': 'digit'} for index, name in enumerate(CLASSES)]
    photo = {'id': len(CLASSES) + 1, 'name': SEG_CLASSES[0], 'supercategory': 'background'}
    kinds = [{**thing, 'isthing': 1, 'color': color} for thing, color in zip(things, PALETTE)]
    kinds.append({**photo, 'isthing': 0, 'color': SEG_PALETTE[0]})
    for name, records, categories in (('instances', annotations, things), ('panoptic', panoptic, kinds)):
        content = {
            'info': {'description': 'PhotoDigits'},
            'images': images,
            'annotations': records,
            'categories': categories,
        }
        (coco_annotations / f'{name}_{split}2017.json').write_text(json.dumps(content))
    return counts


def _describe(mask: np.ndarray, category: int) -> tuple[dict, dict]:
    """What COCO's formats say of a part of an image, and the part's compressed RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    info = {'category_id': category, 'bbox': coco_mask.toBbox(rle).tolist(), 'area': int(coco_mask.area(rle))}
    return {**info, 'iscrowd': 0}, {'size': rle['size'], 'counts': rle['counts'].decode('ascii')}


def _write_crops(root: Path, settings: dict, code: int, split: str, bar: tqdm) -> None:
    """Write the classification images of a split."""
    source = load_source(split)
    folders = [root / 'imagenet' / split / name for name in CLASSES]
    for folder in folders:
        folder.mkdir(parents=True)
    for index in range(settings[f'num_cls_{split}']):
        label = index % len(CLASSES)
        rng = np.random.default_rng([settings['seed'], code, index])
        scene = compose_crop(rng, source, settings['cls_size'], label)
        (folders[label] / f'{index + 1:08d}.jpg').write_bytes(_encode_jpeg(scene.image))
        bar.update()


def _encode_jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def _encode_png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image)[1].tobytes()


def draw_samples(root: str | os.PathLike, path: str | os.PathLike, split: str = 'val') -> None:
    """Draw samples of a written data set into one picture, with their masks and boxes.

    Args:
        root (str | os.PathLike): A folder that :func:`make_photo_digits` wrote.
        path (str | os.PathLike): PNG file to write.
        split (str): 'train' or 'val'. Defaults to 'val'.
    """
    root = Path(root)
    content = json.loads((root / 'coco' / 'annotations' / f'instances_{split}2017.json').read_text())
    ade_split = {'train': 'training', 'val': 'validation'}[split]
    columns = 6
    figure = Figure(figsize=(2 * columns, 10.8), layout='constrained')
    axes = figure.subplots(5, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, title in enumerate(('Scenes', 'Instances (COCO)', 'Segments (ADE20K)', 'Crops (ImageNet)')):
        axes[row, 0].set_title(title, loc='left')
    for (top, middle, bottom, *_), record in zip(axes.T, content['images']):
        image = _read_rgb(root / 'coco' / f'{split}2017' / record['file_name'])
        segments_path = root / 'ade' / 'annotations' / ade_split / record['file_name']
        segments = cv2.imread(str(segments_path.with_suffix('.png')), cv2.IMREAD_UNCHANGED)
        overlay = image // 2
        for annotation in content['annotations']:
            if annotation['image_id'] == record['id']:
                colour = PALETTE[annotation['category_id'] - 1]
                edge = '#{:02x}{:02x}{:02x}'.format(*colour)
                overlay[coco_mask.decode(annotation['segmentation']) > 0] = colour
                x, y, width, height = annotation['bbox']
                middle.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=edge))
                name = CLASSES[annotation['category_id'] - 1]
                middle.text(x, y - 1.5, name, color='white', fontsize=8, weight='bold', clip_on=True)
        top.imshow(image)
        middle.imshow(overlay)
        bottom.imshow(np.array(SEG_PALETTE, np.uint8)[segments - 1])
    crops = sorted((root / 'imagenet' / split).glob('*/*.jpg'), key=lambda crop: crop.name)
    for axis, crop in zip(axes[3:].flat, crops):
        axis.imshow(_read_rgb(crop))
    figure.savefig(path, format='png', dpi=100)


def _read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


class _Canvas:
    """An image that is composed layer by layer, and the visible part of each digit on it."""

    def __init__(self, background: np.ndarray) -> None:
        self.image = background.copy()
        self.background = background
        self.masks = []
        self.areas = []
        self.labels = []
        self.boxes = []
        self.colours = []

    def add_digit(self, rng, alpha, width, corner, label, may_cover=False) -> bool:
        """Lay a digit on top unless it would hide too much; tell whether it did."""
        size = len(self.image)
        box = np.array([*corner, *(c + side for c, side in zip(corner, alpha.shape))])
        overlap = max((_box_iou(box, other) for other in self.boxes), default=0)
        if overlap > (0.3 if may_cover else 0):
            return False
        full = np.zeros((size, size), np.float32)
        begin, end = np.maximum(box[:2], 0), np.minimum(box[2:], size)
        window = tuple(slice(*edges) for edges in zip(begin, end))
        full[window] = alpha[tuple(slice(*edges) for edges in zip(begin - box[:2], end - box[:2]))]
        outline = cv2.dilate(full, _disc(width))
        cover = outline > 0.5
        mask, area = full > 0.5, int((alpha > 0.5).sum())
        if mask.sum() < 0.2 * area or not self._may_hide(cover):
            return False

        near = cv2.dilate(cover.view(np.uint8), _disc(2 + 2 * width)).view(bool) & ~cover
        photo = near & ~np.any(self.masks, axis=0) if self.masks else near
        local = float((self.image[photo if photo.any() else near] @ _LUMA).mean())
        colour = _contrasting_colour(rng, local, self.colours)
        rim = np.float32(0.05 if colour @ _LUMA > local else 0.95)
        part = self.image[window]
        part += outline[window][..., None] * (rim - part)
        part += full[window][..., None] * (colour - part)
        self._hide(cover)
        self.masks.append(mask)
        self.areas.append(area)
        self.labels.append(label)
        self.boxes.append(box)
        self.colours.append(colour)
        return True

    def add_patch(self, patch, top, left) -> None:
        """Lay a rectangle of photograph on top, unless it would hide too much."""
        window = slice(top, top + patch.shape[0]), slice(left, left + patch.shape[1])
        cover = np.zeros(self.image.shape[:2], bool)
        cover[window] = True
        if self._may_hide(cover):
            self.image[window] = patch
            self._hide(cover)

    def scene(self) -> Scene:
        masks = np.array(self.masks)
        return Scene(
            image=np.rint(self.image * 255).astype(np.uint8),
            masks=masks,
            labels=np.array(self.labels, np.int64),
            occlusion=1 - masks.sum(axis=(1, 2)) / np.array(self.areas),
        )

    def _may_hide(self, cover) -> bool:
        return all(
            not (mask & cover).any() or (mask & ~cover).sum() >= (1 - MAX_OCCLUSION) * area
            for mask, area in zip(self.masks, self.areas)
        )

    def _hide(self, cover) -> None:
        for mask in self.masks:
            mask &= ~cover


def _add_patches(rng, canvas) -> None:
    """Lay a small piece of the photograph, from somewhere else in it, on some digits."""
    size = len(canvas.image)
    for mask in canvas.masks:
        if rng.random() < 0.08:
            height, width = (round(size * side) for side in rng.uniform(0.06, 0.14, 2))
            y, x = _choose(rng, np.argwhere(mask))
            top = int(np.clip(y - height // 2, 0, size - height))
            left = int(np.clip(x - width // 2, 0, size - width))
            y, x = rng.integers(size - height + 1), rng.integers(size - width + 1)
            canvas.add_patch(canvas.background[y : y + height, x : x + width], top, left)


def _choose(rng, options):
    return options[rng.integers(len(options))]


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _box_iou(a, b) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    if (sides <= 0).any():
        return 0.0
    common = sides.prod()
    return common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common)


def _contrasting_colour(rng, luma: float, others: list[np.ndarray]) -> np.ndarray:
    """Draw a colour whose luma differs by ``MIN_CONTRAST`` or more, vivid and unlike the others."""
    hue, saturation, value = rng.uniform((0, 0.3, 0), (360, 1, 1), (64, 3)).astype(np.float32).T
    colours = cv2.cvtColor(np.dstack([hue, saturation, value]), cv2.COLOR_HSV2RGB)[0]
    good = np.flatnonzero(np.abs(colours @ _LUMA - luma) >= MIN_CONTRAST)
    if len(good):
        candidates = colours[good[:6]]
        score = np.ptp(candidates, axis=1)
        for other in others:
            score = np.minimum(score, np.linalg.norm(candidates - other, axis=1))
        return candidates[score.argmax()]
    return np.full(3, 0 if luma > 0.5 else 1, np.float32)
