"""Times each op on each backend, as ratios to the memory floor and to the torch backend, its reference.

The memory floor is the time in which a copy moves the maps that an op has to read and write, of its input's dtype.
Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import measuring
import torch
from measuring import FORMATS, spread

from mmspatialmamba import ops

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Inner width and size of the maps of the tiny backbone's stages, for an image of 512x512.
STAGES = ((128, 128), (256, 64), (512, 32), (1024, 16))
QUICK_STAGES = ((16, 16), (32, 8))
# Maps that are read and written in a forward pass, and in a forward and a backward pass.
OPS = {
    'structure_aware_scan': (3, 8),
    'selective_scan': (3, 8),
    'state_fusion': (2, 5),
    'depthwise_conv': (2, 5),
    'gated_layer_norm': (3, 8),
}
RATIOS = {'to_floor': 'to floor', 'torch_to_this': 'torch/this'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ops', nargs='+', choices=OPS, default=list(OPS), help='default: all')
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, help='default: float32 bfloat16, on a GPU float16 too')
    parser.add_argument('--layouts', nargs='+', choices=FORMATS, default=['channels_last'], help='default: %(default)s')
    parser.add_argument('--batches', nargs='+', type=int, help='default: 1, on a GPU 1 and 32')
    parser.add_argument('--backends', nargs='+', choices=['native', 'triton', 'torch'], help='default: those there are')
    args = measuring.parse_benchmark_args(parser)
    on_gpu = args.device == 'cuda'
    args.dtypes = args.dtypes or ['float32', 'bfloat16', *(['float16'] if on_gpu else [])]
    args.batches = args.batches or ([1, 32] if on_gpu and not args.quick else [1])
    reasons = {name: why_unusable(name, args.device) for name in args.backends or ops.available_backends()}
    for name, reason in reasons.items():
        if args.backends and reason:
            parser.error(f'--backends {name}: {reason}')
    args.backends = [name for name, reason in reasons.items() if reason is None]
    return args


def on_backend(backend: str, call) -> torch.Tensor:
    with ops.use_backend(backend):
        return call()


def why_unusable(backend: str, device: str) -> str | None:
    """Return why a backend cannot run on a device, or None where it can."""
    try:
        on_backend(backend, make_call('state_fusion', 1, 1, 4, torch.float32, 'contiguous', device)[0])
    except ValueError as error:
        return str(error)
    return None


def make_call(op, batch, dim, size, dtype, layout, device) -> tuple[partial, list[torch.Tensor]]:
    """Make a call of an op as a block makes it, on random square maps; return it and the inputs that need gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    u, delta, B, C = (random(batch, n, size, size).to(dtype) for n in (dim, dim, 1, 1))
    u, delta = (x.contiguous(memory_format=FORMATS[layout]) for x in (u, delta))
    kernels, alpha = tuple(random(dim, 1, 3, 3) for _ in range(3)), random(3)
    A, D, bias = -random(dim, 1).exp(), random(dim), random(dim)
    weight, scale, shift = (parameter.to(dtype) for parameter in (kernels[0], D, bias))
    tokens = [x.permute(0, 2, 3, 1).contiguous() for x in (u, delta)]
    args = {
        'structure_aware_scan': (u, delta, A, B, C, D, kernels, alpha, bias),
        'selective_scan': (u.flatten(2), delta.flatten(2), A, B.flatten(2), bias, True),
        'state_fusion': (u, kernels, alpha),
        'depthwise_conv': (u, weight, shift, 'silu'),
        'gated_layer_norm': (*tokens, scale, shift),
    }[op]
    inputs = [x for arg in args for x in (arg if isinstance(arg, tuple) else [arg]) if isinstance(x, torch.Tensor)]
    return partial(getattr(ops, op), *args), [x.requires_grad_() for x in inputs]


def compare(args, op, layout, dtype, batch, dim, size) -> list[dict]:
    """Measure an op at one shape: a row for each backend."""
    call, inputs = make_call(op, batch, dim, size, DTYPES[dtype], layout, args.device)

    def both(backend) -> None:
        torch.autograd.grad(on_backend(backend, call), inputs, gradient)

    forward, gradient = torch.no_grad()(on_backend), torch.randn_like(call())
    a, b = (torch.zeros_like(inputs[0], requires_grad=False) for _ in range(2))
    functions = {'copy': partial(a.copy_, b)}
    for name in args.backends:
        functions |= {('forward', name): partial(forward, name, call), ('both', name): partial(both, name)}
    times = measuring.measure(functions, args.seconds)
    rows = []
    for name in args.backends:
        row = dict(op=op, batch=batch, dim=dim, size=size, dtype=dtype, layout=layout, backend=name)
        row['kept_bytes_an_element'] = measuring.kept_bytes(partial(on_backend, name, call)) / inputs[0].numel()
        for part, maps in zip(('forward', 'both'), OPS[op]):
            mine, floor = times[part, name], times['copy'] * maps / 2
            row[part] = dict(runs=len(mine), milliseconds=spread(mine), to_floor=spread(mine / floor))
            if 'torch' in args.backends:
                row[part]['torch_to_this'] = spread(times[part, 'torch'] / mine)
        rows.append(row)
    return rows


def main() -> None:
    args = parse_args()
    record = dict(machine=measuring.machine(args), rows=[])
    columns = ('forward ms', *RATIOS.values(), 'fwd+bwd ms', *RATIOS.values(), 'kept B/el')
    lines = [['op', 'batch x dim x map', 'dtype', 'layout', 'backend', *columns]]
    stages = QUICK_STAGES if args.quick else STAGES
    for *case, stage in product(args.ops, args.layouts, args.dtypes, args.batches, stages):
        for row in compare(args, *case, *stage):
            record['rows'].append(row)
            size = f'{row["batch"]} x {row["dim"]} x {row["size"]}'
            line = [row['op'], size, row['dtype'], row['layout'], row['backend']]
            for figures in (row['forward'], row['both']):
                line.append(f'{figures["milliseconds"]["median"]:.3f}')
                line += [f'{figures[key]["median"]:.2f}' if key in figures else '' for key in RATIOS]
            lines.append([*line, f'{row["kept_bytes_an_element"]:.1f}'])
    print(measuring.table(lines))
    measuring.write(args.out, 'ops', record)


if __name__ == '__main__':
    main()
