"""Times structure_aware_scan on each backend, as ratios to the memory floor and to the eager composition.

The memory floor of a forward pass is torch.add of two arrays of u's shape and dtype into a third, that of a backward
pass such an addition and a copy: what has to be read and written. Eager is the composition of PyTorch's own operators:
scan, padding, three dilated convolutions, read-out. It also times the torch backend's scan against a Python loop.
Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
from collections import deque
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from measuring import DTYPES, FORMATS, add_arguments, machine, measure, prepare, spread, table, write

from mmspatialmamba import ops
from mmspatialmamba.ops.selective_scan import reference

# Inner width and size of the maps of the tiny backbone's stages, for an image of 512x512.
STAGES = ((128, 128), (256, 64), (512, 32), (1024, 16))
QUICK_STAGES = ((16, 16), (32, 8))
LOOP_LENGTH, LOOP_DIM = 16_384, 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 'work_dirs/benchmark')
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, help='default: float32 bfloat16, on a GPU float16 too')
    parser.add_argument('--layouts', nargs='+', choices=FORMATS, default=['channels_last'], help='default: %(default)s')
    parser.add_argument('--batches', nargs='+', type=int, help='default: 1, on a GPU 1 and 32')
    parser.add_argument('--backends', nargs='+', choices=['native', 'triton', 'torch'], help='default: those there are')
    parser.add_argument(
        '--from-memory',
        type=int,
        default=0,
        metavar='MIB',
        help="let forward passes and their floor take turns on copies of u, delta and y, and of the floor's arrays, of "
        'so many MiB together, so that caches smaller than that hold none of them; default: the same arrays each time',
    )
    args = parser.parse_args()
    prepare(args)
    on_gpu = args.device == 'cuda'
    args.dtypes = args.dtypes or ['float32', 'bfloat16', *(['float16'] if on_gpu else [])]
    args.batches = args.batches or ([1, 32] if on_gpu and not args.quick else [1])
    usable = [name for name in ops.available_backends() if ops.dispatch.why_unusable(name, args.device) is None]
    for name in set(args.backends or ()) - set(usable):
        parser.error(f'--backends {name}: {ops.dispatch.why_unusable(name, args.device)}')
    args.backends = args.backends or usable
    return args


def make_inputs(batch, dim, height, width, dtype, layout, device) -> list[torch.Tensor]:
    """Arguments of the op: u, delta, A, B, C, D, kernels 1, 3 and 5, alpha, delta_bias."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    maps = [random(batch, dim, height, width) for _ in range(2)]
    rows = [random(batch, 1, height, width) for _ in range(2)]
    u, delta, B, C = (t.to(dtype).contiguous(memory_format=FORMATS[layout]) for t in (*maps, *rows))
    kernels = [random(dim, 1, 3, 3) for _ in range(3)]
    return [u, delta, -random(dim, 1).exp(), B, C, random(dim), *kernels, random(3), random(dim)]


def fused(backend, u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    with ops.use_backend(backend):
        return ops.structure_aware_scan(u, delta, A, B, C, D, (k1, k3, k5), alpha, delta_bias)


def eager(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias):
    dim = u.shape[1]
    h = reference.selective_scan(u.flatten(2), delta.flatten(2), A, B.flatten(2), delta_bias, True)
    h = h[:, :, 0].unflatten(2, u.shape[2:])
    g = sum(
        alpha[i] * F.conv2d(F.pad(h, (k,) * 4, mode='replicate'), kernel, dilation=k, groups=dim)
        for i, (k, kernel) in enumerate(((1, k1), (3, k3), (5, k5)))
    )
    return (C * g + D.view(-1, 1, 1) * u).to(u.dtype)


def kept_bytes(function, leaves) -> int:
    """Bytes of the storages that autograd keeps between a forward and a backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*leaves)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del out
    return sum(storages.values())


def compare(args, batch, dim, size, dtype, layout) -> list[dict]:
    """Measure one shape: a row for each backend, and one for the eager composition."""
    inputs = make_inputs(batch, dim, size, size, DTYPES[dtype], layout, args.device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.randn_like(inputs[0])
    subjects = {name: partial(fused, name) for name in args.backends} | {'eager': eager}
    a, b, out, other = (torch.empty_like(inputs[0]).normal_() for _ in range(4))
    copies = args.from_memory * 2**20 // (3 * inputs[0].nbytes)
    inputs_in_turn = cycle([inputs, *([*(t.clone() for t in inputs[:2]), *inputs[2:]] for _ in range(copies))])
    arrays_in_turn = cycle([(a, b, out), *(tuple(t.clone() for t in (a, b, out)) for _ in range(copies))])

    def floor_of_forward():
        a, b, out = next(arrays_in_turn)
        torch.add(a, b, out=out)

    def floor_of_both():
        torch.add(a, b, out=out)
        torch.add(a, b, out=out)
        other.copy_(a)

    outputs = deque(maxlen=copies)  # kept, so that the next ones are written elsewhere

    def forward(function):
        with torch.no_grad():
            outputs.append(function(*next(inputs_in_turn)))

    def both(function):
        torch.autograd.grad(function(*leaves), leaves, grad)

    def backward(graph):
        torch.autograd.grad(graph, leaves, grad, retain_graph=True)

    kept = {name: kept_bytes(function, leaves) / inputs[0].numel() for name, function in subjects.items()}
    graphs = {name: function(*leaves) for name, function in subjects.items()}
    for _ in range(2 * copies):
        forward(next(iter(subjects.values())))  # or the outputs' memory is new to the process while it is measured
    functions = {('forward', 'floor'): floor_of_forward, ('both', 'floor'): floor_of_both}
    for name, function in subjects.items():
        functions |= {
            ('forward', name): partial(forward, function),
            ('both', name): partial(both, function),
            ('backward', name): partial(backward, graphs[name]),
        }
    times = measure(functions, args.device, args.seconds)
    rows = []
    for name in subjects:
        row = dict(batch=batch, dim=dim, height=size, width=size, dtype=dtype, layout=layout, backend=name)
        row['kept_bytes_an_element'] = kept[name]
        row['backward_to_forward'] = spread(times['backward', name] / times['forward', name])
        for part in ('forward', 'both'):
            mine = times[part, name]
            row[part] = {
                'milliseconds': spread(mine),
                'floor_milliseconds': spread(times[part, 'floor']),
                'to_floor': spread(mine / times[part, 'floor']),
                'eager_to_this': spread(times[part, 'eager'] / mine),
                'runs': len(mine),
            }
        rows.append(row)
    return rows


def python_loop(u, delta, A, B):
    """h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t, a step at a time."""
    decay, drive = torch.exp(delta * A), delta * B * u
    h, states = torch.zeros_like(u[..., 0]), []
    for a, b in zip(decay.unbind(-1), drive.unbind(-1)):
        h = a * h + b
        states.append(h)
    return torch.stack(states, dim=-1)


def compare_with_loop(args) -> dict:
    """The torch backend's scan against a Python loop, one sequence of the first stage's width."""
    length = 512 if args.quick else LOOP_LENGTH
    generator = torch.Generator().manual_seed(0)
    u, delta, B = (torch.rand(1, n, length, generator=generator).to(args.device) for n in (LOOP_DIM, LOOP_DIM, 1))
    A = -torch.rand(LOOP_DIM, 1, generator=generator).to(args.device)
    leaves = [t.requires_grad_() for t in (u, delta, A, B)]

    def scan(*tensors):
        with ops.use_backend('torch'):
            return ops.selective_scan(*tensors)[:, :, 0]

    subjects = {'loop': python_loop, 'torch': scan}
    torch.testing.assert_close(scan(*leaves), python_loop(*leaves), rtol=1e-4, atol=1e-4)
    functions = {}
    for name, function in subjects.items():

        def forward(function=function):
            with torch.no_grad():
                function(*leaves)

        def both(function=function):
            out = function(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        functions |= {('forward', name): forward, ('both', name): both}
    times = measure(functions, args.device, args.seconds, rounds=(3, 20))
    result = dict(length=length, dim=LOOP_DIM, dtype='float32')
    for part in ('forward', 'both'):
        loop, mine = times[part, 'loop'], times[part, 'torch']
        result[part] = dict(milliseconds=spread(mine), loop_milliseconds=spread(loop), loop_to_this=spread(loop / mine))
    return result


def draw(figure, record) -> None:
    axes = figure.subplots(1, 2)
    for axis, part, title in zip(axes, ('forward', 'both'), ('forward', 'forward and backward')):
        rows = [row for row in record['rows'] if row['dtype'] == record['rows'][0]['dtype']]
        rows = [row for row in rows if row['layout'] == rows[0]['layout']]
        shapes = list(dict.fromkeys((row['batch'], row['dim'], row['height']) for row in rows))
        names = list(dict.fromkeys(row['backend'] for row in rows))
        for i, name in enumerate(names):
            mine = [row[part]['to_floor'] for row in rows if row['backend'] == name]
            median = [m['median'] for m in mine]
            error = [[m['median'] - m['q25'] for m in mine], [m['q75'] - m['median'] for m in mine]]
            at = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(shapes))]
            bars = axis.bar(at, median, 0.8 / len(names), yerr=error, label=name)
            axis.bar_label(bars, fmt='%.1f', fontsize=7, padding=2)
        axis.set(yscale='log', title=title, ylabel='time, as a ratio to the memory floor')
        axis.set_xticks(range(len(shapes)), [f'{b} x {d} x {s} x {s}' for b, d, s in shapes], fontsize=7)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.margins(y=0.15)
    axes[0].legend(fontsize=8)
    machine = record['machine']
    figure.suptitle(f'structure_aware_scan, {record["rows"][0]["dtype"]}, {machine["device"]}', fontsize=10)


def main() -> None:
    args = parse_args()
    record = dict(machine=machine(args), options={k: str(v) for k, v in vars(args).items()}, rows=[])
    header = ['batch x dim x map', 'dtype', 'layout', 'backend', 'forward ms', 'to floor', 'eager/this']
    header += ['fwd+bwd ms', 'to floor', 'eager/this', 'bwd/fwd', 'kept B/el']
    lines = [header]
    cases = [
        (batch, dim, size, dtype, layout)
        for layout in args.layouts
        for dtype in args.dtypes
        for batch in args.batches
        for dim, size in (QUICK_STAGES if args.quick else STAGES)
    ]
    for case in cases:
        for row in compare(args, *case):
            record['rows'].append(row)
            line = [f'{row["batch"]} x {row["dim"]} x {row["height"]}', row['dtype'], row['layout'], row['backend']]
            for part in ('forward', 'both'):
                line.append(f'{row[part]["milliseconds"]["median"]:.3f}')
                line += [f'{row[part][ratio]["median"]:.2f}' for ratio in ('to_floor', 'eager_to_this')]
            line += [f'{row["backward_to_forward"]["median"]:.2f}', f'{row["kept_bytes_an_element"]:.1f}']
            lines.append(line)
    print(table(lines))
    record['python_loop'] = loop = compare_with_loop(args)
    print(
        f'torch backend, scan of {loop["length"]} tokens: a Python loop takes '
        f'{loop["forward"]["loop_to_this"]["median"]:.1f} times as long forward, '
        f'{loop["both"]["loop_to_this"]["median"]:.1f} times forward and backward'
    )
    write(args, 'ops', record, draw)


if __name__ == '__main__':
    main()
