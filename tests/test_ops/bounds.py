"""The published error bounds of the ops, and what they are measured on.

``python tests/test_ops/bounds.py`` measures the backends that run here and prints the table of docs/numerics.md.
"""

from __future__ import annotations

import torch
from test_ops.truth import dilated_convolutions, scan_of_map, sequential_scan

from mmspatialmamba import ops
from mmspatialmamba.ops.dispatch import why_unusable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAPS = ('u', 'delta', 'B', 'C', 'h')
FUSION = ('kernel1', 'kernel3', 'kernel5', 'alpha')
INPUTS = {
    'selective_scan': ('u', 'delta', 'A', 'B', 'delta_bias'),
    'state_fusion': ('h', *FUSION),
    'structure_aware_scan': ('u', 'delta', 'A', 'B', 'C', 'D', *FUSION, 'delta_bias'),
}
_FLOAT32 = {'output': 2e-6, 'gradient': 5e-6}
# Half a unit in the last place of the largest value, as a share of it.
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def bound(stored_as: torch.dtype, gradient: bool) -> float:
    """Largest error of a result that is computed in float32 and stored in a dtype."""
    return _FLOAT32['gradient' if gradient else 'output'] + _ROUNDING[stored_as]


def output_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if op == 'structure_aware_scan' else torch.float32


# Of each op, with maps of each dtype and float32 parameters: the bound of its output and of each gradient.
BOUNDS = {
    op: {
        dtype: {
            'output': bound(output_dtype(op, dtype), False),
            **{name: bound(dtype if name in MAPS else torch.float32, True) for name in names},
        }
        for dtype in DTYPES
    }
    for op, names in INPUTS.items()
}


def run(op: str, inputs: dict, delta_softplus: bool = True) -> torch.Tensor:
    """Call a public op with named inputs."""
    inputs = dict(inputs)
    if op == 'selective_scan':
        return ops.selective_scan(**inputs, delta_softplus=delta_softplus)
    kernels = [inputs.pop(f'kernel{k}') for k in (1, 3, 5)]
    if op == 'state_fusion':
        return ops.state_fusion(inputs['h'], kernels, inputs['alpha'])
    return ops.structure_aware_scan(**inputs, kernels=kernels, delta_softplus=delta_softplus)


def run_truth(op: str, inputs: dict, delta_softplus: bool = True, **kwargs) -> torch.Tensor:
    """The same in float64, by the definition."""
    if op == 'selective_scan':
        return sequential_scan(**inputs, delta_softplus=delta_softplus, **kwargs)
    values = list(inputs.values())
    if op == 'state_fusion':
        return dilated_convolutions(values[0], values[1:4], values[4])
    return scan_of_map(*values, delta_softplus=delta_softplus, **kwargs)


def output_and_gradients(function, op: str, inputs: dict, grad: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """The output of an op, and its gradient for each input, by the input's name."""
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.items()}
    output = function(op, leaves, **kwargs)
    output.backward(grad.to(output.dtype))
    return {'output': output.detach(), **{n: leaf.grad for n, leaf in leaves.items() if leaf is not None}}


def ordinary_inputs(op: str, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """Inputs as a network in training has them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, height, width = 2, 40, 14, 23

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    maps = {name: normal(batch, dim, height, width).contiguous(memory_format=torch.channels_last) for name in 'uh'}
    maps['delta'] = normal(batch, dim, height, width) - 4
    maps |= {name: normal(batch, 1, height, width) for name in 'BC'}
    values = {name: value.to(dtype) for name, value in maps.items()}
    values |= {f'kernel{k}': 1 + 0.3 * normal(dim, 1, 3, 3) for k in (1, 3, 5)}
    values |= {'A': -normal(dim, 1).exp(), 'D': 1 + 0.3 * normal(dim), 'alpha': 1 + 0.3 * normal(3)}
    values['delta_bias'] = normal(dim)
    grad = normal(batch, dim, height, width)
    if op == 'selective_scan':
        values |= {name: values[name].flatten(2) for name in ('u', 'delta', 'B')}
        grad = grad.flatten(2).unsqueeze(2)
    return {name: values[name] for name in INPUTS[op]}, grad.to(output_dtype(op, dtype))


def measure(op: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of each result over its largest true value, on ordinary inputs."""
    inputs, grad = ordinary_inputs(op, dtype)
    values = output_and_gradients(run, op, inputs, grad)
    truths = output_and_gradients(run_truth, op, {n: t.double() for n, t in inputs.items()}, grad.double())
    return {
        name: ((values[name].double() - truth).abs().max() / truth.abs().max()).item() for name, truth in truths.items()
    }


def table() -> str:
    """The bounds, and the largest errors among the backends that run CPU tensors, in Markdown."""
    backends = [name for name in ops.available_backends() if why_unusable(name, 'cpu') is None]
    lines = ['| op | result | ' + ' | '.join(f'{str(d)[6:]}: bound | measured' for d in DTYPES) + ' |']
    lines.append('|' + '---|' * (2 + 2 * len(DTYPES)))
    for op, of_op in BOUNDS.items():
        errors = {dtype: {} for dtype in DTYPES}
        for backend in backends:
            with ops.use_backend(backend):
                for dtype in DTYPES:
                    for name, error in measure(op, dtype).items():
                        errors[dtype][name] = max(error, errors[dtype].get(name, 0.0))
        for name in ('output', *INPUTS[op]):
            cells = ' | '.join(f'{of_op[dtype][name]:.2e} | {errors[dtype][name]:.1e}' for dtype in DTYPES)
            lines.append(f'| {op} | {name if name == "output" else f"gradient of {name}"} | {cells} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
