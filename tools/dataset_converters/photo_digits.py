"""Make PhotoDigits: digits on photographs, in the formats of COCO, ADE20K and ImageNet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmspatialmamba.datasets.photo_digits import (
    ADE_SPLITS,
    CLASSES,
    PALETTE,
    SEG_PALETTE,
    SettingsError,
    make_photo_digits,
)

COLUMNS = 6
TITLES = ('Scenes', 'Instances (COCO)', 'Segments (ADE20K)', 'Crops (ImageNet)')


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


def draw_samples(root: Path, path: str | Path, split: str = 'val') -> None:
    """Draw samples of a written data set into one PNG file, with their masks and boxes."""
    content = json.loads((root / 'coco' / 'annotations' / f'instances_{split}2017.json').read_text())
    figure = Figure(figsize=(2 * COLUMNS, 10.8), layout='constrained')
    axes = figure.subplots(5, COLUMNS)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[:, 0], TITLES):
        axis.set_title(title, loc='left')
    for (top, middle, bottom, *_), record in zip(axes.T, content['images']):
        image = read_rgb(root / 'coco' / f'{split}2017' / record['file_name'])
        segments = root / 'ade' / 'annotations' / ADE_SPLITS[split] / record['file_name']
        segments = cv2.imread(str(segments.with_suffix('.png')), cv2.IMREAD_UNCHANGED) - 1
        colours = np.array(SEG_PALETTE, np.uint8)[segments]
        for axis, picture in zip(
            (top, middle, bottom), (image, np.where(segments[..., None], colours, image // 2), colours)
        ):
            axis.imshow(picture)
        for annotation in content['annotations']:
            if annotation['image_id'] == record['id']:
                x, y, width, height = annotation['bbox']
                digit = annotation['category_id'] - 1
                edge = np.divide(PALETTE[digit], 255)
                middle.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=edge))
                middle.text(x, y - 1.5, CLASSES[digit], color='white', fontsize=8, weight='bold', clip_on=True)
    crops = sorted((root / 'imagenet' / split).glob('*/*.jpg'), key=lambda crop: crop.name)
    for axis, crop in zip(axes[3:].flat, crops):
        axis.imshow(read_rgb(crop))
    figure.savefig(path, format='png', dpi=100)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to create')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels (default: 128)')
    parser.add_argument('--num-train', type=int, required=True, help='number of training scenes')
    parser.add_argument('--num-val', type=int, help='validation scenes (default: a quarter of --num-train)')
    parser.add_argument('--cls-size', type=int, default=64, help='side of a crop in pixels (default: 64)')
    parser.add_argument('--num-cls-train', type=int, help='training crops (default: 4 times --num-train)')
    parser.add_argument('--num-cls-val', type=int, help='validation crops (default: 4 times --num-val)')
    parser.add_argument('--seed', type=int, default=0, help='seed that fixes every byte (default: 0)')
    parser.add_argument('--show', nargs='?', const='', metavar='PNG', help='draw samples (default: DIR/samples.png)')
    parser.add_argument('--overwrite', action='store_true', help='replace a PhotoDigits folder of other settings')
    args = vars(parser.parse_args())

    # The images are too small for several threads to pay.
    cv2.setNumThreads(0)
    show = args.pop('show')
    if show:
        if not show.endswith('.png'):
            parser.error(f'--show needs a file name that ends in .png, got {show}')
        if not Path(show).absolute().parent.is_dir():
            parser.error(f'--show cannot write {show}: its folder does not exist')
    try:
        written = make_photo_digits(**args, progress=True)
        print(f'{args["out"]}: {"complete" if written else "already there, with the same settings"}')
        if show is not None:
            show = show or args['out'] / 'samples.png'
            draw_samples(args['out'], show)
            print(f'{show}: samples')
    except SettingsError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f'cannot make {args["out"]}: {error}')


if __name__ == '__main__':
    main()
