"""Registers each backend's kernels with torch.library, so that they differentiate, compile and export.

The three backends have the same ops, in a namespace each: ``mmspatialmamba_torch``, ``mmspatialmamba_triton`` and
``mmspatialmamba_native``. The first two's kernels are Python functions; the third's are compiled, and define their
schemas themselves (csrc/extension.cpp). Autocast casts none of their inputs: they take mixed dtypes as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import torch_backend

SCHEMAS = {
    'selective_scan': '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, bool delta_softplus) -> Tensor',
    'selective_scan_backward': (
        '(Tensor grad, Tensor h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, bool delta_softplus)'
        f' -> ({", ".join(["Tensor"] * 5)})'
    ),
    'state_fusion': '(Tensor h, Tensor k1, Tensor k3, Tensor k5, Tensor alpha) -> Tensor',
    'state_fusion_backward': (
        f'(Tensor grad, Tensor h, Tensor k1, Tensor k3, Tensor k5, Tensor alpha) -> ({", ".join(["Tensor"] * 5)})'
    ),
    'structure_aware_scan': (
        '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor k1, Tensor k3, Tensor k5, '
        'Tensor alpha, Tensor? delta_bias, bool delta_softplus) -> Tensor'
    ),
    'structure_aware_scan_backward': (
        '(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor k1, Tensor k3, '
        f'Tensor k5, Tensor alpha, Tensor? delta_bias, bool delta_softplus) -> ({", ".join(["Tensor"] * 11)})'
    ),
}


def _fake_selective_scan(u, delta, A, B, delta_bias, delta_softplus):
    dtype = torch_backend.compute_dtype(u, delta, A, B)
    return u.new_empty((u.shape[0], *A.shape, u.shape[2]), dtype=dtype)


def _fake_state_fusion(h, k1, k3, k5, alpha):
    return torch.empty_like(h, dtype=torch_backend.compute_dtype(h, k1, k3, k5, alpha))


def _fake_structure_aware_scan(u, *others):
    return torch.empty_like(u)


def _like_the_inputs(first: int) -> Callable:
    """Gradients of every tensor argument from the position ``first`` on; that of an absent bias is of A's shape."""

    def fake(*args):
        inputs = args[first:]
        gradients = [torch.empty_like(t) for t in inputs if isinstance(t, torch.Tensor)]
        if inputs[-2] is None:
            gradients.append(inputs[2].new_empty(inputs[2].shape[0]))
        return tuple(gradients)

    return fake


FAKES = {
    'selective_scan': _fake_selective_scan,
    'selective_scan_backward': _like_the_inputs(2),
    'state_fusion': _fake_state_fusion,
    'state_fusion_backward': lambda grad, *inputs: tuple(torch.empty_like(t) for t in inputs),
    'structure_aware_scan': _fake_structure_aware_scan,
    'structure_aware_scan_backward': _like_the_inputs(1),
}

# Fused on the CPU only: elsewhere PyTorch's own kernels do this work, and the other backends leave it to them.
CPU_FAKES = {
    'depthwise_conv': lambda x, weight, bias, finish: torch.empty_like(x),
    'depthwise_conv_backward': lambda grad, *inputs: tuple(torch.empty_like(t) for t in inputs[:3]),
    'downsampling_conv': lambda x, weight, bias: torch.empty_like(x[..., ::2, ::2], memory_format=torch.channels_last),
    'downsampling_conv_backward': lambda grad, y, x, weight, bias: (
        torch.empty_like(x, memory_format=torch.channels_last),
        *(torch.empty_like(t) for t in (weight, bias)),
    ),
    'gated_layer_norm': lambda x, gate, weight, bias, eps: x.new_empty(x.shape),
    'gated_layer_norm_backward': lambda grad, x, gate, weight, bias, eps: (
        *(t.new_empty(t.shape) for t in (x, gate)),
        *(torch.empty_like(t) for t in (weight, bias)),
    ),
    'biased_gelu': lambda x, bias: x.new_empty(x.shape),
    'biased_gelu_backward': lambda grad, x, bias: (x.new_empty(x.shape), torch.empty_like(bias)),
}


def _fake_linear(x, weight, *others):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


PRODUCT_FAKES = {
    'linear': _fake_linear,
    'linear_weight_gradient': lambda grad, x: x.new_empty((grad.shape[-1], x.shape[-1])),
    'gelu_linear': lambda x, gelu_bias, weight, bias: _fake_linear(x, weight),
    'gelu_linear_backward': lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs),
}

# For inference, without autograd: see models/layers/inference.py.
INFERENCE_FAKES = {
    'stem': lambda x, *others: x.new_empty(
        (x.shape[0], (x.shape[1] + 3) // 4, (x.shape[2] + 3) // 4, others[-4].shape[0])
    ),
    'block': lambda x, *others: torch.empty_like(x, memory_format=torch.channels_last),
    'downsample': lambda x, *others: x.new_empty(
        (x.shape[0], (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, others[-4].shape[0])
    ),
    'layer_norm_planes': lambda x, *others: x.new_empty(x.shape),
}

_NATIVE_FAKES = {**FAKES, **{op: f for op, f in CPU_FAKES.items() if op.startswith(('depthwise', 'gated'))}}


def _save(ctx, inputs, *more: torch.Tensor) -> None:
    """Keep an op's arguments, and more tensors, for the backward pass."""
    ctx.is_tensor = [isinstance(t, torch.Tensor) for t in inputs]
    ctx.constants = [None if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, inputs)]
    ctx.save_for_backward(*(t for t, is_tensor in zip(inputs, ctx.is_tensor) if is_tensor), *more)


def _restore(ctx) -> tuple[list, list[torch.Tensor]]:
    """What ``_save`` kept."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.constants)]
    return inputs, list(saved)


def _for_arguments(ctx, gradients) -> tuple:
    """The gradients of the tensors among an op's arguments, with None for the others."""
    gradients = iter(gradients)
    return tuple(next(gradients) if is_tensor else None for is_tensor in ctx.is_tensor)


def _register_autograd(namespace: str, op: str) -> None:
    """Differentiate ``op`` by its backward op, and that, for second derivatives, by the truth.

    What is kept for the backward pass is the inputs, and of some its output.
    """
    keeps_output = op in ('selective_scan', 'downsampling_conv')

    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *([output] if keeps_output else []))

    def backward(ctx, grad):
        inputs, output = _restore(ctx)
        backward_op = getattr(getattr(torch.ops, namespace), f'{op}_backward')
        return _for_arguments(ctx, backward_op(grad, *output, *inputs))

    def setup_second_context(ctx, inputs, output):
        _save(ctx, [inputs[0], *inputs[2:]] if keeps_output else inputs)

    def second_backward(ctx, *grads):
        (grad, *inputs), _ = _restore(ctx)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in (grad, *inputs)]
            tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
            output = getattr(torch_backend, op)(*leaves[1:])
            first = torch.autograd.grad(output, tensors[1:], leaves[0], create_graph=True)
            chosen = [(f, g) for f, g in zip(first, grads) if g is not None and f.requires_grad]
            second = torch.autograd.grad(
                [f for f, _ in chosen], tensors, [g for _, g in chosen], allow_unused=True, materialize_grads=True
            )
        second = _for_arguments(ctx, second)
        return (second[0], None, *second[1:]) if keeps_output else second

    torch.library.register_autograd(f'{namespace}::{op}', backward, setup_context=setup_context)
    torch.library.register_autograd(f'{namespace}::{op}_backward', second_backward, setup_context=setup_second_context)


def missing(backend: str) -> list[str]:
    """Names of the ops that the loaded library of a backend does not define."""
    namespace = getattr(torch.ops, f'mmspatialmamba_{backend}')
    return [op for op in _NATIVE_FAKES if not hasattr(namespace, op)]


def _register_products() -> None:
    """Differentiate the native matrix products, any number of times: the gradients are products again."""
    ops, namespace = torch.ops.mmspatialmamba_native, 'mmspatialmamba_native'

    def keep(ctx, inputs, output):
        """The factors of the gradients that are needed, each of which has the other factor."""
        (a, b, *_), (of_a, of_b, *_) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)

    def of_linear(ctx, grad):
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else ops.linear(grad, weight.t(), None),
            None if x is None else ops.linear_weight_gradient(grad, x),
            grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None,
        )

    def of_weight_gradient(ctx, grad):
        output_grad, x = ctx.saved_tensors
        return (
            None if x is None else ops.linear(x, grad, None),
            None if output_grad is None else ops.linear(output_grad, grad.t(), None),
        )

    torch.library.register_autograd(f'{namespace}::linear', of_linear, setup_context=keep)
    torch.library.register_autograd(f'{namespace}::linear_weight_gradient', of_weight_gradient, setup_context=keep)


_libraries = []


def register(backend: str, kernels: Mapping[str, Callable] | None = None) -> None:
    """Register a backend's ops: those of ``SCHEMAS``, and for the native backend the ones that it alone has.

    Args:
        backend (str): Name of the backend; the ops' namespace is ``mmspatialmamba_`` and this.
        kernels (Mapping[str, Callable], optional): A Python function for each key of ``SCHEMAS``. Defaults to None,
            for ops which a loaded library defined.
    """
    namespace = f'mmspatialmamba_{backend}'
    if kernels is not None:
        library = torch.library.Library(namespace, 'FRAGMENT')
        _libraries.append(library)
        for op, schema in SCHEMAS.items():
            library.define(op + schema)
            library.impl(op, kernels[op], 'CompositeExplicitAutograd')
    for op, fake in (FAKES if kernels is not None else _NATIVE_FAKES).items():
        torch.library.register_fake(f'{namespace}::{op}', fake)
        if f'{op}_backward' in _NATIVE_FAKES:
            _register_autograd(namespace, op)
