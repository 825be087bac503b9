"""Times the tiny backbone beside torchvision's Swin-T, ConvNeXt-T and ResNet-50, and measures memory.

All models are timed in turn in one process, so every ratio is of one run. The peers are torchvision's, without head,
each in the memory format that is faster for it. Where torchvision is not installed, SpatialMamba is measured alone;
where mmengine is not, it is built from its layers, without drop path and output norms.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import re
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import measuring
import torch
from measuring import MIB, spread
from torch import nn

OURS = 'SpatialMamba-T'
HAS_MMENGINE = find_spec('mmengine') is not None
PEERS = {'Swin-T': 'swin_t', 'ConvNeXt-T': 'convnext_tiny', 'ResNet-50': 'resnet50'} if find_spec('torchvision') else {}
INPUTS = {'inference': ['1x224x224', '1x512x512', '1x800x1216', '1x1024x2048'], 'training': ['2x512x512']}
GPU_INPUT = '64x224x224'
KEYS = ('size', 'task', 'precision', 'name', 'form', 'layout')
PRECISIONS = ('float32', 'autocast', 'bfloat16')


def shape(text: str) -> str:
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*x[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no BATCHxHEIGHTxWIDTH, such as 1x512x512')
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for task, sizes in INPUTS.items():
        inputs = f'default: {" ".join(sizes)}, on a GPU {GPU_INPUT} too'
        parser.add_argument(f'--{task}', nargs='*', type=shape, metavar='BxHxW', help=inputs)
    precisions = 'autocast: to bfloat16; bfloat16: weights and inputs; default: all, in training float32 and autocast'
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, help=precisions)
    parser.add_argument('--compile', action='store_true', help='time the models through torch.compile too')
    parser.add_argument('--prepare', action='store_true', help="measure the inference of prepare_for_cpu's copy too")
    parser.add_argument('--no-memory', action='store_true', help="don't measure peak memory")
    profile = "only count Python calls of a training forward pass, all and in the model's library; Swin-T's has a head"
    parser.add_argument('--profile', action='store_true', help=profile)
    args = measuring.parse_benchmark_args(parser)
    if args.prepare and args.device == 'cuda':
        parser.error('--prepare measures a copy for CPUs: use --device cpu')
    if args.quick:
        args.precisions = args.precisions or ['float32']
    for task, sizes in INPUTS.items():
        if getattr(args, task) is None:
            sizes = [*sizes, GPU_INPUT] if args.device == 'cuda' else sizes
            setattr(args, task, ['2x64x64'] if args.quick else sizes)
    return args


def build(name: str) -> nn.Module:
    """Build a model with random weights and no classification head."""
    if name == OURS and not HAS_MMENGINE:
        return build_from_layers()
    if name == OURS:
        from mmspatialmamba.models import SpatialMamba

        return SpatialMamba('tiny')
    from torchvision.models import get_model

    model = get_model(PEERS[name])
    return getattr(model, 'features', None) or nn.Sequential(*list(model.children())[:-2])


def build_from_layers() -> nn.Sequential:
    """Build the tiny backbone from its layers, which need torch alone."""
    from mmspatialmamba.models.layers import Downsample, SpatialMambaBlock, Stem

    layers = [Stem(3, 64)]
    for width, depth in ((64, 2), (128, 4), (256, 8), (512, 4)):
        layers += [SpatialMambaBlock(width) for _ in range(depth)]
        layers += [Downsample(width)] if width < 512 else []
    return nn.Sequential(*layers)


class Step:
    """One forward pass, or one training step, of a model on an input of a size, BATCHxHEIGHTxWIDTH.

    Weights and input have the memory format ``layout``. ``form`` is 'eager', 'compiled', or 'prepared' for the CPU.
    """

    def __init__(self, name, task, precision, layout, size, device, form='eager') -> None:
        torch.manual_seed(0)
        batch, height, width = map(int, size.split('x'))
        dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        where = dict(device=device, dtype=dtype, memory_format=measuring.FORMATS[layout])
        self.model = build(name).to(**where).train(task == 'training')
        self.image = torch.rand(batch, 3, height, width).to(**where)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4) if task == 'training' else None
        if form == 'prepared':
            from mmspatialmamba.deploy import prepare_for_cpu

            self.model = prepare_for_cpu(self.model)
        forward = torch.compile(self.model, dynamic=False) if form == 'compiled' else self.model
        self.outputs = partial(torch.autocast(device, torch.bfloat16, precision == 'autocast')(forward), self.image)

    def __call__(self) -> None:
        if self.optimizer is None:
            with torch.inference_mode():
                self.outputs()
            return
        outputs = self.outputs()
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        sum(output.float().mean() for output in outputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> float:
        """Count the bytes that autograd keeps, parameters left out, for each pixel of the input."""
        return measuring.kept_bytes(self.outputs, self.model.parameters()) / self.image[:, 0].numel()


def faster_layout(args, name, task, precision, size) -> str:
    if name == OURS:
        return 'channels_last'
    steps = {layout: Step(name, task, precision, layout, size, args.device) for layout in measuring.FORMATS}
    times = measuring.measure(steps, 0, rounds=(3, 3))
    return min(times, key=lambda layout: times[layout].min())


def memory_of(case: dict) -> dict[str, float]:
    """Measure the peak memory of three steps, and its rise above what is held before, model included, in MiB.

    On a GPU it is what PyTorch allocated for this model. On the CPU it is the process's resident memory.
    """
    others = torch.cuda.memory_allocated()
    step = Step(**case)
    before = measuring.reset_peak_memory(case['device'])
    for _ in range(3):
        step()
    peak = measuring.peak_memory(case['device'])
    return {'peak_mib': (peak - others) / MIB, 'rise_mib': (peak - before) / MIB}


def compare(args, task, precision, size) -> list[dict]:
    """Measure all models at one input: a row for each."""
    if args.compile:
        torch.compiler.reset()  # or the many inputs reach the recompilation limit, and run eagerly
    names = [OURS, *PEERS]
    layouts = {name: faster_layout(args, name, task, precision, size) for name in names}
    forms = ['eager', 'compiled'] if args.compile else ['eager']
    subjects = [(name, form) for form in forms for name in names]
    if args.prepare and task == 'inference' and precision != 'autocast':
        subjects.append((OURS, 'prepared'))
    same = dict(task=task, precision=precision, size=size, device=args.device)
    cases = {(name, form): dict(name=name, layout=layouts[name], form=form, **same) for name, form in subjects}
    steps = {subject: Step(**case) for subject, case in cases.items()}
    times = measuring.measure(steps, args.seconds)
    rows = []
    for (name, form), mine in times.items():
        base = 'compiled' if form == 'compiled' else 'eager'
        row = dict(cases[name, form], library='mmspatialmamba' if name == OURS else 'torchvision', runs=len(mine))
        row |= dict(milliseconds=spread(mine), ratios={of: spread(mine / times[of, base]) for of in names})
        if task == 'training' and form == 'eager':
            row['kept_bytes_a_pixel'] = steps[name, form].kept_bytes()
        if not args.no_memory and form != 'compiled':
            on_cpu = args.device == 'cpu'
            row |= measuring.in_fresh_process(memory_of, cases[name, form]) if on_cpu else memory_of(cases[name, form])
        rows.append(row)
    return rows


def count_calls(model: nn.Module, package: str) -> list[int]:
    """Count the files of a package that a training forward pass enters, the calls in them, and all Python calls."""
    model, image, calls = model.train(), torch.rand(2, 3, 64, 64), Counter()
    model(image)
    profiler = cProfile.Profile(builtins=False)
    profiler.runcall(model, image)
    for entry in profiler.getstats():
        calls[entry.code.co_filename] += entry.callcount
    root = str(Path(find_spec(package).origin).parent) + os.sep
    inside = [number for file, number in calls.items() if file.startswith(root)]
    return [len(inside), sum(inside), sum(calls.values())]


def profile() -> str:
    rows = [['model', 'package', 'files of it', 'calls in them', 'all calls']]
    rows.append([OURS, 'mmspatialmamba', *map(str, count_calls(build(OURS), 'mmspatialmamba'))])
    if PEERS:
        from torchvision.models import swin_t

        rows.append(['Swin-T', 'torchvision', *map(str, count_calls(swin_t(), 'torchvision'))])
    return measuring.table(rows)


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.benchmark = True
    if args.profile:
        print(profile())
        return
    print("the peers are torchvision's" if PEERS else 'torchvision is not installed: the peers are left out')
    if not HAS_MMENGINE:
        print('mmengine is not installed: the backbone is built from its layers')
    record = dict(machine=measuring.machine(args), from_layers=not HAS_MMENGINE, rows=[])
    ratios = ['of ours', *(f'of {peer}' for peer in PEERS)]
    lines = [[*KEYS, 'ms', 'IQR', *ratios, 'peak MiB', 'rise MiB', 'kept B/pixel']]
    for task in INPUTS:
        for precision in args.precisions or (PRECISIONS if task == 'inference' else PRECISIONS[:2]):
            for size in getattr(args, task):
                print(f'{task} of {size}, {precision} ...', flush=True)
                for row in compare(args, task, precision, size):
                    record['rows'].append(row)
                    ms = row['milliseconds']
                    line = [*(row[key] for key in KEYS), f'{ms["median"]:.2f}']
                    line += [f'{ms["q75"] - ms["q25"]:.2f}', *(f'{r["median"]:.2f}' for r in row['ratios'].values())]
                    memory = (row.get(key) for key in ('peak_mib', 'rise_mib', 'kept_bytes_a_pixel'))
                    lines.append(line + ['' if value is None else f'{value:.0f}' for value in memory])
    print(measuring.table(lines))
    measuring.write(args.out, 'backbone', record)


if __name__ == '__main__':
    main()
