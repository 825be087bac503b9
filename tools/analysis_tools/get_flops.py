"""Counts a model's parameters and multiply-adds, with the get_flops.py of mmdet, mmseg or mmpretrain."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path

import mmengine.analysis
import numpy as np
from PIL import Image

import mmspatialmamba  # noqa: F401
from mmspatialmamba.engine.launch import LaunchError, find_scope, find_script, load_config
from mmspatialmamba.ops.flops import register_with_mmengine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config; its default_scope names the library whose script counts')
    parser.add_argument('--shape', type=int, nargs=2, required=True, metavar=('H', 'W'), help='size of the input image')
    return parser.parse_args()


def one_image_coco(folder: Path, height: int, width: int) -> list[str]:
    """Write a COCO data set of one image of noise, since mmdet's script takes its inputs from the config's data set.

    Args:
        folder (Path): Where to write it.
        height (int): Of the image.
        width (int): Of the image.

    Returns:
        list[str]: The options that make mmdet's script use it.
    """
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / 'image.png')
    image = dict(id=1, file_name='image.png', height=height, width=width)
    (folder / 'coco.json').write_text(json.dumps(dict(images=[image], annotations=[], categories=[])))
    options = dict(data_root=f'{folder}/', ann_file='coco.json')
    options = [f'val_dataloader.dataset.{key}={value}' for key, value in options.items()]
    return [
        '--cfg-options',
        # A pure Python config may have none.
        'default_scope=mmdet',
        *options,
        'val_dataloader.dataset.data_prefix.img=',
        'val_dataloader.dataset.data_prefix.seg=',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
    ]


def from_inputs_alone(get_model_complexity_info):
    """mmseg 1.2.2 gives mmengine's function the input and its shape, of which mmengine 0.10.7 takes only one."""

    def count(model, input_shape, inputs, **kwargs):
        return get_model_complexity_info(model, inputs=inputs, **kwargs)

    return count


def main() -> int:
    args = parse_args()
    try:
        scope = find_scope(load_config(args.config))
        script = str(find_script(scope, 'analysis_tools/get_flops', args.config))
    except LaunchError as error:
        print(f'get_flops.py: {error}', file=sys.stderr)
        return 2
    register_with_mmengine()
    with tempfile.TemporaryDirectory() as folder:
        options = ['--shape', *map(str, args.shape)]
        if scope == 'mmdet':
            options = one_image_coco(Path(folder), *args.shape)
        elif scope == 'mmseg':
            count = mmengine.analysis.get_model_complexity_info
            mmengine.analysis.get_model_complexity_info = from_inputs_alone(count)
        sys.argv = [script, args.config, *options]
        runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
