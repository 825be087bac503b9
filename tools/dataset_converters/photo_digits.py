"""Make PhotoDigits: digits on photographs, in the formats of COCO, ADE20K and ImageNet."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2

from mmspatialmamba.datasets.photo_digits import (
    SettingsError,
    draw_samples,
    make_photo_digits,
)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message}\n')


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
