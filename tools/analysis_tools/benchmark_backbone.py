"""Times the tiny backbone against Swin-T, ConvNeXt-T and ResNet-50 at the same inputs, and takes their peak memory.

The peers are mmpretrain's (with bfloat16 weights torchvision's Swin-T, as mmpretrain's fails), else torchvision's,
without head, each in the memory format that is faster for it. All models are timed in turn in one process, so every
ratio is of one run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import torch
from measuring import (
    FORMATS,
    add_arguments,
    machine,
    measure,
    peak_memory,
    prepare,
    reset_peak_memory,
    spread,
    table,
    write,
)
from torch import nn

OURS = 'SpatialMamba-T'
PEERS = ('Swin-T', 'ConvNeXt-T', 'ResNet-50')
OP_ALONE = 'structure_aware_scan'
INFERENCE = ('1x224x224', '1x512x512', '1x800x1216', '1x1024x2048')
TRAINING = ('2x512x512',)
GPU_INPUTS = ('64x224x224',)
PRECISIONS = ('float32', 'autocast', 'bfloat16')
DROP_PATH_RATE = 0.2


def shape(text: str) -> str:
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*x[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no BATCHxHEIGHTxWIDTH, such as 1x512x512')
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 'work_dirs/benchmark')
    batch = f'default: %s, on a GPU {" ".join(GPU_INPUTS)} too'
    parser.add_argument('--inference', nargs='*', type=shape, metavar='BxHxW', help=batch % ' '.join(INFERENCE))
    parser.add_argument('--training', nargs='*', type=shape, metavar='BxHxW', help=batch % ' '.join(TRAINING))
    parser.add_argument(
        '--precisions',
        nargs='+',
        choices=PRECISIONS,
        help='autocast: to bfloat16; bfloat16: weights and inputs; default: all, in training float32 and autocast',
    )
    parser.add_argument('--compile', action='store_true', help='time the models through torch.compile too')
    parser.add_argument('--no-memory', action='store_true', help="don't take the peak memory")
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare(args, for_time=args.memory_of is None)
    more = GPU_INPUTS if args.device == 'cuda' else ()
    inference, training = [*INFERENCE, *more], [*TRAINING, *more]
    if args.quick:
        inference, training = ['1x64x64'], ['2x64x64']
        args.precisions = args.precisions or ['float32']
    if args.inference is None:
        args.inference = inference
    if args.training is None:
        args.training = training
    return args


def build(name: str, library: str | None) -> nn.Module:
    """Build a model with random weights and no classification head."""
    if name == OURS:
        from mmspatialmamba.models import SpatialMamba

        return SpatialMamba('tiny', drop_path_rate=DROP_PATH_RATE)
    if library == 'mmpretrain':
        from mmpretrain.models import ConvNeXt, ResNet, SwinTransformer

        out = dict(out_indices=(0, 1, 2, 3))
        if name == 'Swin-T':
            return SwinTransformer('tiny', drop_path_rate=DROP_PATH_RATE, pad_small_map=True, **out)
        if name == 'ConvNeXt-T':
            return ConvNeXt('tiny', drop_path_rate=DROP_PATH_RATE, gap_before_final_norm=False, **out)
        return ResNet(50, **out)
    from torchvision.models import convnext_tiny, resnet50, swin_t

    if name == 'Swin-T':
        return swin_t().features
    if name == 'ConvNeXt-T':
        return convnext_tiny(stochastic_depth_prob=DROP_PATH_RATE).features
    return nn.Sequential(*list(resnet50().children())[:-2])


def total(outputs) -> torch.Tensor:
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum(output.float().mean() for output in outputs)


class Step:
    """One forward pass, or one training step, of a model on an input.

    Args:
        name (str): The model.
        library (str, optional): The peers' library.
        task (str): 'inference' or 'training'.
        precision (str): One of ``PRECISIONS``.
        layout (str): Memory format of weights and input: 'channels_last' or 'contiguous'.
        size (str): BATCHxHEIGHTxWIDTH.
        device (str): 'cpu' or 'cuda'.
        compiled (bool): Whether through ``torch.compile``. Defaults to False.
    """

    def __init__(self, name, library, task, precision, layout, size, device, compiled=False) -> None:
        torch.manual_seed(0)
        batch, height, width = map(int, size.split('x'))
        dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        where = dict(device=device, dtype=dtype, memory_format=FORMATS[layout])
        self.model = build(name, library).to(**where)
        self.model.train(task == 'training')
        self.image = torch.rand(batch, 3, height, width).to(**where)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4) if task == 'training' else None
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        autocast = precision == 'autocast'
        self.autocast = partial(torch.autocast, device, torch.bfloat16) if autocast else nullcontext

    def __call__(self) -> None:
        if self.optimizer is None:
            with torch.inference_mode(), self.autocast():
                self.forward(self.image)
            return
        with self.autocast():
            loss = total(self.forward(self.image))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class OpAlone:
    """The op of every block of the tiny backbone, at the shapes of an image of the given size."""

    def __init__(self, size: str, device: str) -> None:
        from benchmark_ops import make_inputs

        from mmspatialmamba.models import SpatialMamba

        batch, height, width = map(int, size.split('x'))
        arch = SpatialMamba.arch_settings['tiny']
        self.stages = []
        for i, depth in enumerate(arch['depths']):
            scale, dim = 2 ** (i + 2), arch['embed_dims'] * 2 ** (i + 1)
            maps = -(-height // scale), -(-width // scale)
            self.stages.append((depth, make_inputs(batch, dim, *maps, torch.float32, 'channels_last', device)))

    def __call__(self) -> None:
        from mmspatialmamba.ops import structure_aware_scan

        with torch.inference_mode():
            for depth, (u, delta, A, B, C, D, k1, k3, k5, alpha, bias) in self.stages:
                for _ in range(depth):
                    structure_aware_scan(u, delta, A, B, C, D, (k1, k3, k5), alpha, bias)


def faster_layout(args, name, library, task, precision, size) -> str:
    if name == OURS:
        return 'channels_last'
    steps = {layout: Step(name, library, task, precision, layout, size, args.device) for layout in FORMATS}
    times = measure(steps, args.device, 0, rounds=(3, 3))
    return min(times, key=lambda layout: times[layout].min())


def memory_of(device: str, *case: str) -> dict[str, float]:
    """MiB at the peak of three steps, and by how much that is above what there was before them, the model included.

    On a GPU it is what PyTorch allocated for this model. On the CPU it is the process's resident memory.
    """
    others = torch.cuda.memory_allocated() if device == 'cuda' else 0
    step = Step(*case, device)
    before = reset_peak_memory(device) - others
    for _ in range(3):
        step()
    peak = peak_memory(device) - others
    return {'peak_mib': peak / 2**20, 'rise_mib': (peak - before) / 2**20}


def take_memory(args: argparse.Namespace, *case: str) -> dict[str, float]:
    """:func:`memory_of` a step, on the CPU in a fresh process, whose memory holds nothing else.

    Raises:
        SystemExit: If the process fails.
    """
    if args.device == 'cuda':
        return memory_of('cuda', *case)
    command = [sys.executable, __file__, '--device', 'cpu', '--threads', str(torch.get_num_threads())]
    command += ['--out', str(args.out), '--memory-of', json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f'taking the memory of {" ".join(map(str, case))} failed:\n{result.stderr}')
    return json.loads(result.stdout.splitlines()[-1])


def compare(args, library, task, precision, size) -> list[dict]:
    """Measure all models at one input: a row for each."""
    names = [OURS, *(PEERS if library else ())]
    libraries = dict.fromkeys(names, library)
    if (library, precision) == ('mmpretrain', 'bfloat16'):
        # The attention masks of mmpretrain's are float32, which its products with bfloat16 values refuse.
        libraries['Swin-T'] = 'torchvision'
    layouts = {name: faster_layout(args, name, libraries[name], task, precision, size) for name in names}
    steps = {}
    for compiled in (False, True) if args.compile else (False,):
        for name in names:
            case = (name, libraries[name], task, precision, layouts[name], size, args.device)
            steps[name, compiled] = Step(*case, compiled=compiled)
    if (task, precision) == ('inference', 'float32'):
        steps[OP_ALONE, False] = OpAlone(size, args.device)
    times = measure(steps, args.device, args.seconds)
    rows = []
    for (name, compiled), mine in times.items():
        layout = layouts.get(name, 'channels_last')
        row = dict(model=name, compiled=compiled, task=task, input=size, precision=precision, layout=layout)
        row |= dict(library=libraries[name] if name in PEERS else 'mmspatialmamba', runs=len(mine))
        row['milliseconds'] = spread(mine)
        row['to_ours'] = spread(mine / times[OURS, compiled])
        row['ours_to_this'] = spread(times[OURS, compiled] / mine)
        if not (args.no_memory or compiled or name == OP_ALONE):
            row['memory'] = take_memory(args, name, libraries[name], task, precision, layout, size)
        rows.append(row)
    return rows


def draw(figure, record) -> None:
    rows = [row for row in record['rows'] if row['model'] in PEERS and not row['compiled']]
    cases = list(dict.fromkeys((row['task'], row['precision'], row['input']) for row in record['rows']))
    figure.set_size_inches(max(10, 0.8 * len(cases)), 5)
    axis = figure.subplots()
    for i, name in enumerate(PEERS):
        mine = {
            (row['task'], row['precision'], row['input']): row['ours_to_this'] for row in rows if row['model'] == name
        }
        at = [j + (i - 1) * 0.27 for j, case in enumerate(cases) if case in mine]
        values = [mine[case] for case in cases if case in mine]
        median = [v['median'] for v in values]
        error = [[v['median'] - v['q25'] for v in values], [v['q75'] - v['median'] for v in values]]
        bars = axis.bar(at, median, 0.27, yerr=error, label=f'to {name}')
        axis.bar_label(bars, fmt='%.2f', fontsize=6, padding=2)
    axis.axhline(1, color='black', linewidth=0.8)
    axis.set_xticks(range(len(cases)), ['\n'.join(case) for case in cases], fontsize=7)
    axis.set_ylabel("SpatialMamba-T's time, as a ratio to a peer's")
    if rows:
        axis.legend(fontsize=8)
    figure.suptitle(f'SpatialMamba-T, {record["machine"]["device"]}', fontsize=10)


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.benchmark = True
    bare = find_spec('mmengine') is None
    if bare:
        from without_openmmlab import stand_in

        stand_in()
    if args.memory_of:
        print(json.dumps(memory_of(args.device, *json.loads(args.memory_of))))
        return
    libraries = ('torchvision',) if bare else ('mmpretrain', 'torchvision')
    library = next((name for name in libraries if find_spec(name) is not None), None)
    if bare:
        print('mmengine is not installed: the backbone runs on what without_openmmlab.py has in its place')
    if library != 'mmpretrain':
        which = 'the peers are left out' if library is None else "the peers are torchvision's"
        print(f'mmpretrain is not installed: {which} ({", ".join(PEERS)})')
    record = dict(
        machine=machine(args), options={k: str(v) for k, v in vars(args).items()}, without_openmmlab=bare, rows=[]
    )
    header = [
        'input',
        'task',
        'precision',
        'model',
        'layout',
        'compiled',
        'ms',
        'IQR',
        'ours/this',
        'peak MiB',
        'rise MiB',
    ]
    lines = [header]
    for task, sizes in (('inference', args.inference), ('training', args.training)):
        for precision in args.precisions or (PRECISIONS if task == 'inference' else PRECISIONS[:2]):
            for size in sizes:
                print(f'{task} of {size}, {precision} ...', flush=True)
                for row in compare(args, library, task, precision, size):
                    record['rows'].append(row)
                    ms, memory = row['milliseconds'], row.get('memory')
                    line = [size, task, precision, row['model'], row['layout'], 'yes' if row['compiled'] else 'no']
                    line += [f'{ms["median"]:.2f}', f'{ms["q75"] - ms["q25"]:.2f}']
                    line.append(f'{row["ours_to_this"]["median"]:.2f}')
                    line += [f'{memory["peak_mib"]:.0f}', f'{memory["rise_mib"]:.0f}'] if memory else ['', '']
                    lines.append(line)
    print(table(lines))
    write(args, 'backbone', record, draw)


if __name__ == '__main__':
    main()
