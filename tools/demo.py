"""Train and test a classifier, a detector and a segmenter on PhotoDigits, with the libraries' own scripts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).resolve().parents[1]
WORK_DIR = Path('work_dirs/demo')
DATA = Path('data/photo_digits')
NUM_PROCESSES = 2
CONFIGS = {
    'classification': 'configs/demo/spatialmamba-pico_photo-digits.py',
    'detection': 'configs/demo/mask-rcnn_spatialmamba-pico_fpn_photo-digits.py',
    'segmentation': 'configs/demo/spatialmamba-pico_upernet_photo-digits.py',
}
METRICS = (
    ('classification', 'test', 'accuracy/top1', 'top-1', 1),
    ('classification', 'test-tta', 'accuracy/top1', 'top-1, TTA', 1),
    ('detection', 'test', 'coco/bbox_mAP', 'box AP', 100),
    ('detection', 'test-tta', 'coco/bbox_mAP', 'box AP, TTA', 100),
    ('detection', 'test', 'coco/segm_mAP', 'mask AP', 100),
    ('detection', 'test-tta', 'coco/segm_mAP', 'mask AP, TTA', 100),
    ('segmentation', 'test', 'mIoU', 'mIoU', 1),
    ('segmentation', 'test-tta', 'mIoU', 'mIoU, TTA', 1),
)


def run(name: str, command: list, folder: Path, **environment: str) -> None:
    """Run a command with its output in a log, and record its seconds, unless it was done before.

    Args:
        name (str): Name of the step, for the messages and its files.
        command (list): The command and its arguments.
        folder (Path): The folder of the log and of the record.
        **environment (str): Environment variables to add.

    Raises:
        SystemExit: If the command fails.
    """
    done, log = folder / f'{name}.seconds', folder / f'{name}.log'
    if done.exists():
        print(f'demo: {folder.name}, {name}: done before', flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(part) for part in command]
    print(f'demo: {folder.name}, {name} ... (log: {log})', flush=True)
    start = time.monotonic()
    with log.open('a') as stream:
        code = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
        ).returncode
    if code:
        tail = '\n'.join(f'  | {line}' for line in log.read_text(errors='replace').splitlines()[-25:])
        sys.exit(
            f'demo: this command failed with exit code {code}:\n  {shlex.join(command)}\n'
            f'The end of {log}:\n{tail}\nRepair what it says and run `make demo` again: it continues from here.'
        )
    seconds = time.monotonic() - start
    done.write_text(f'{seconds:.1f}\n')
    print(f'demo: {folder.name}, {name}: {seconds / 60:.1f} min', flush=True)


def train(task: str, *options: str) -> Path:
    """Train a task in ``NUM_PROCESSES`` processes, resuming what an interrupted run left.

    Args:
        task (str): A key of ``CONFIGS``.
        *options (str): Values of ``--cfg-options``.

    Returns:
        Path: The last checkpoint.
    """
    folder = WORK_DIR / task
    command = ['bash', 'tools/dist_train.sh', CONFIGS[task], NUM_PROCESSES, '--work-dir', folder, '--resume']
    if options:
        command += ['--cfg-options', *options]
    run('train', command, folder, PYTHON=sys.executable, OMP_NUM_THREADS='1', PORT=str(get_free_port()))
    return Path((folder / 'last_checkpoint').read_text().strip())


def test(task: str, checkpoint: Path, name: str = 'test', *options: str) -> None:
    """Test a checkpoint in one process with one thread.

    Args:
        task (str): A key of ``CONFIGS``.
        checkpoint (Path): The checkpoint.
        name (str): Name of the step. Defaults to 'test'.
        *options (str): More arguments of the test script.
    """
    work_dir = WORK_DIR / task / name
    command = [sys.executable, 'tools/test.py', CONFIGS[task], checkpoint, '--work-dir', work_dir, *options]
    run(name, command, WORK_DIR / task, OMP_NUM_THREADS='1')


def painted(task: str) -> Path:
    """Return the folder of the painted predictions of a task."""
    return WORK_DIR / task / 'test' / 'painted'


def metrics(task: str, name: str) -> dict:
    """Read the metrics of the last test of a task."""
    path = max((WORK_DIR / task / name).glob('*/*.json'))
    return json.loads(path.read_text())


def minutes(task: str, name: str) -> float:
    """Read the minutes that a step took."""
    return float((WORK_DIR / task / f'{name}.seconds').read_text()) / 60


def draw_contact_sheet(task: str, columns: int = 4, rows: int = 3, width: int = 360) -> Path:
    """Draw painted predictions of a task on one picture.

    Args:
        task (str): A key of ``CONFIGS``.
        columns (int): Pictures in a row. Defaults to 4.
        rows (int): Number of rows. Defaults to 3.
        width (int): Width of each in pixels. Defaults to 360.

    Returns:
        Path: The PNG file.
    """
    paths = sorted(path for path in (WORK_DIR / task / 'test').rglob('*') if path.suffix in ('.jpg', '.png'))
    step = max(1, len(paths) // (columns * rows))
    pictures = [Image.open(path).convert('RGB') for path in paths[::step][: columns * rows]]
    height = round(width * pictures[0].height / pictures[0].width)
    sheet = Image.new('RGB', (columns * width, rows * height), 'white')
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((width, height), Image.LANCZOS), (i % columns * width, i // columns * height))
    path = WORK_DIR / f'{task}.png'
    sheet.save(path)
    return path


def draw_loss_curves() -> Path:
    """Draw the training losses of the three tasks.

    Returns:
        Path: The PNG file.
    """
    figure, axes = plt.subplots(1, len(CONFIGS), figsize=(12, 3.2), layout='constrained')
    for axis, task in zip(axes, CONFIGS):
        records = {}
        for path in sorted((WORK_DIR / task).glob('*/vis_data/scalars.json')):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                if 'loss' in record:
                    records[record['step']] = record['loss']
        axis.plot(sorted(records), [records[step] for step in sorted(records)])
        axis.set(title=task, xlabel='iteration', ylabel='loss', ylim=(0, None))
        axis.grid(alpha=0.3)
    path = WORK_DIR / 'loss.png'
    figure.savefig(path, dpi=120)
    return path


def print_table() -> None:
    """Print one row for each metric, with the minutes of its training and its test."""
    table = Table('task', 'metric', 'value', 'train (min)', 'test (min)', title='SpatialMamba on PhotoDigits')
    for task, name, key, title, scale in METRICS:
        row = [f'{metrics(task, name)[key] * scale:.1f}', f'{minutes(task, "train"):.1f}', f'{minutes(task, name):.1f}']
        table.add_row(task, title, *row)
    Console(width=90).print(table)


def main() -> None:
    """Make the data, train, test, and print the results."""
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    os.chdir(ROOT)
    start = time.monotonic()
    converter = [sys.executable, 'tools/dataset_converters/photo_digits.py', '--out', DATA, '--size', 96]
    numbers = ['--num-train', 2000, '--num-val', 200, '--cls-size', 48, '--num-cls-train', 8000, '--num-cls-val', 500]
    if not (DATA / 'meta.json').exists():
        (WORK_DIR / 'data' / 'photo_digits.seconds').unlink(missing_ok=True)
    run('photo_digits', [*converter, *numbers], WORK_DIR / 'data')

    classifier = train('classification')
    pretrained = f'pretrained={classifier}'
    detector = train('detection', pretrained)
    segmenter = train('segmentation', pretrained)
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        tests = [
            pool.submit(test, 'detection', detector, 'test', '--show-dir', 'painted'),
            pool.submit(test, 'detection', detector, 'test-tta', '--tta'),
            pool.submit(test, 'segmentation', segmenter, 'test', '--show-dir', painted('segmentation')),
            pool.submit(test, 'segmentation', segmenter, 'test-tta', '--tta'),
            pool.submit(test, 'classification', classifier, 'test-tta', '--tta'),
            pool.submit(
                test, 'classification', classifier, 'test', '--show-dir', painted('classification'), '--interval', '20'
            ),
        ]
        for finished in tests:
            finished.result()

    pictures = [draw_loss_curves(), *(draw_contact_sheet(task) for task in CONFIGS)]
    print_table()
    print('pictures: ' + ', '.join(map(str, pictures)))
    backbone = MODELS.build(Config.fromfile(CONFIGS['classification']).model.backbone)
    size = sum(parameter.numel() for parameter in backbone.parameters())
    print(f'backbone: {size:,} parameters; this run took {(time.monotonic() - start) / 60:.1f} min')


if __name__ == '__main__':
    main()
