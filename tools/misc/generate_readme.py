"""Writes the README of each config folder from its metafile, or checks that it says the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMAND = 'python tools/misc/generate_readme.py'
DENSE_NOTE = 'Backbones start from ImageNet-1K weights: `model.backbone.init_cfg.checkpoint` names the file.'
FOLDERS = {
    'classification': dict(
        title='image classification with mmpretrain',
        metrics={'Top 1 Accuracy': 'top-1'},
        input='224x224',
        memory='',
        task='cls',
        note='The published classifiers were trained with MESA self-distillation.',
        options='Files of classifiers hold two sets of weights; `ema://FILE`, or `--ema`, takes the averaged ones.',
        example="""from mmpretrain import get_model, inference_model, list_models

print(list_models('*spatialmamba*'))
model = get_model('{name}', pretrained='FILE')
print(inference_model(model, 'IMAGE')['pred_class'])""",
    ),
    'detection': dict(
        title='object detection and instance segmentation with mmdet',
        metrics={'box AP': 'box AP', 'mask AP': 'mask AP'},
        input='1280x800',
        memory='; training memory is with one image of that size, [on a CPU](../../docs/heads.md)',
        task='det',
        note=DENSE_NOTE,
        example="""from mmdet.apis import DetInferencer

inferencer = DetInferencer('{name}', weights='FILE')
inferencer('IMAGE', out_dir='outputs')""",
    ),
    'segmentation': dict(
        title='semantic segmentation with mmseg',
        metrics={'mIoU': 'mIoU', 'mIoU(ms+flip)': 'mIoU (ms+flip)'},
        input='2048x512',
        memory='; training memory is with one image of 512x512 (Cityscapes: two of 1024x512), '
        '[on a CPU](../../docs/heads.md)',
        task='seg',
        note=DENSE_NOTE,
        example="""from mmseg.apis import MMSegInferencer

inferencer = MMSegInferencer('{name}', weights='FILE')
inferencer('IMAGE', out_dir='outputs')""",
    ),
}
README = """\
# Spatial-Mamba: {title}

<!-- Written by tools/misc/generate_readme.py from metafile.yml: edit those. -->

> [{paper}]({paper_url})

## Abstract

State-space models read an image as one long row of pixels, so neighbours above and below are far apart for them; other
vision Mambas scan in several directions to make up for it. Spatial-Mamba scans once, in row-major order, and then lets
the hidden states of neighbouring pixels mix: three depthwise convolutions of dilation 1, 3 and 5 over the map of states
(structure-aware state fusion), before the output is read from them. The cost stays linear in the number of pixels. Four
stages of such blocks make a backbone of the usual pyramid shape.

## Results

The figures are the paper's: this project has not trained on these data sets itself.
{note}
Multiply-adds are counted at {input}{memory}.
{tables}
## Train and test

```bash
python tools/train.py configs/{folder}/{name}.py
python tools/test.py configs/{folder}/{name}.py FILE
```

By name, in Python:

```python
import mmspatialmamba.apis  # makes the names below known
{example}
```

## Published weights

[The original release]({code_url}) lists its files in its README.
They load as they are wherever FILE stands above, and [what was loaded is told](../../docs/checkpoints.md). To make
a file of tensors alone (DST) of what you downloaded (SRC):

```bash
python tools/model_converters/upstream_to_mmspatialmamba.py SRC DST --task {task}
```
{options}
## Citation

```bibtex
@inproceedings{{xiao2025spatialmamba,
  title     = {{{paper}}},
  author    = {{Chaodong Xiao and Minghan Li and Zhengqiang Zhang and Deyu Meng and Lei Zhang}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2025}}
}}
```
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if a README is out of date')
    return parser.parse_args()


def load_metafile(folder: str) -> dict:
    """Read a metafile and check that it holds what a README needs.

    Args:
        folder (str): The folder in ``configs``.

    Returns:
        dict: The metafile.

    Raises:
        SystemExit: If it is no YAML, or a model lacks its name, its config or its data set.
    """
    path = ROOT / 'configs' / folder / 'metafile.yml'
    try:
        metafile = yaml.safe_load(path.read_text(encoding='utf-8'))
    except yaml.YAMLError as error:
        raise SystemExit(f'{path.relative_to(ROOT)}: {" ".join(str(error).split())}') from error
    for number, model in enumerate(metafile['Models'], start=1):
        missing = [key for key in ('Name', 'Config') if key not in model]
        missing += [key for key in ('Training Data',) if key not in model.get('Metadata', {})]
        if missing:
            name = model.get('Name', f'number {number}')
            raise SystemExit(f'{path.relative_to(ROOT)}: model {name} lacks {" and ".join(missing)}')
    return metafile


def quantity(value: int | None, unit: float, suffix: str) -> str:
    """Format a count in its unit, to the four digits that are published at most.

    Args:
        value (int, optional): The count.
        unit (float): What it is divided by.
        suffix (str): The unit's letter.

    Returns:
        str: For example "26.75 M", or "-" without a count.
    """
    return '-' if value is None else f'{value / unit:.4g} {suffix}'


def schedule(metadata: dict) -> str:
    """Format the length of a training.

    Args:
        metadata (dict): A model's ``Metadata``.

    Returns:
        str: For example "12 epochs" or "160k iterations", or "-" if neither is there.
    """
    if 'Epochs' in metadata:
        return f'{metadata["Epochs"]} epochs'
    return f'{metadata["Iterations"] // 1000}k iterations' if 'Iterations' in metadata else '-'


def table(models: list[dict], metrics: dict[str, str]) -> str:
    """Make a table of the models of one data set.

    Args:
        models (list[dict]): Entries of a metafile.
        metrics (dict[str, str]): The names of the metrics in the metafile, and in the table's head.

    Returns:
        str: Lines of Markdown. A model without results is "not trained yet".
    """
    head = ['model', 'schedule', 'parameters', 'multiply-adds', 'training memory', *metrics.values(), 'weights']
    rows = [head, ['---'] * len(head)]
    for model in models:
        metadata = model['Metadata']
        found = {key: value for result in model.get('Results') or [] for key, value in result['Metrics'].items()}
        values = [f'{found[key]:.1f}' if key in found else '-' for key in metrics]
        source = model.get('Converted From')
        rows.append(
            [
                f'[{model["Name"]}]({Path(model["Config"]).name})',
                schedule(metadata),
                quantity(metadata.get('Parameters'), 1e6, 'M'),
                quantity(metadata.get('FLOPs'), 1e9, 'G'),
                f'{metadata["Training Memory (GB)"]} GB' if 'Training Memory (GB)' in metadata else '-',
                *(values if found else ['not trained yet', *values[1:]]),
                f'[original release]({source["Weights"]})' if source else '-',
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def make_readme(folder: str, collection: dict, models: list[dict]) -> str:
    """Make a folder's README.

    Args:
        folder (str): The folder in ``configs``.
        collection (dict): What is common to all models: paper and code.
        models (list[dict]): The folder's models; the first is the one in the examples.

    Returns:
        str: The README's text.
    """
    facts = dict(FOLDERS[folder])
    by_data = {}
    for model in models:
        by_data.setdefault(model['Metadata']['Training Data'], []).append(model)
    metrics = facts.pop('metrics')
    name = models[0]['Name']
    facts['example'] = facts['example'].format(name=name)
    facts['options'] = f'\n{facts["options"]}\n' if 'options' in facts else ''
    return README.format(
        folder=folder,
        name=name,
        paper=collection['Paper']['Title'],
        paper_url=collection['Paper']['URL'],
        code_url=collection['Code']['URL'],
        tables=''.join(f'\n### {data}\n\n{table(group, metrics)}\n' for data, group in by_data.items()),
        **facts,
    )


def main():
    check = parse_args().check
    metafiles = {folder: load_metafile(folder) for folder in FOLDERS}
    (collection,) = metafiles['classification']['Collections']
    readmes = {
        ROOT / 'configs' / folder / 'README.md': make_readme(folder, collection, metafile['Models'])
        for folder, metafile in metafiles.items()
    }
    stale = [path for path, text in readmes.items() if not path.is_file() or path.read_text(encoding='utf-8') != text]
    names = ', '.join(str(path.relative_to(ROOT)) for path in stale)
    if check and stale:
        raise SystemExit(f'{names}: differs from what the metafile says; run {COMMAND}')
    for path in stale:
        path.write_text(readmes[path], encoding='utf-8')
    print(f'written: {names}' if stale else 'every README is up to date')


if __name__ == '__main__':
    main()
