"""What the ops share: checked arguments, and registration with torch.library.

Each backend's ops have a namespace: ``mmspatialmamba_torch``, ``mmspatialmamba_triton`` and ``mmspatialmamba_native``.
The kernels of the first two are Python functions; those of the third are compiled, and csrc/extension.cpp defines their
schemas. Autocast casts none of their inputs: they take mixed dtypes as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Union

import torch

from .. import compat
from . import dispatch

Shape = tuple[Union[str, int], ...]
Gradients = tuple[torch.Tensor, ...]

MAP: Shape = ('batch', 'dim', 'height', 'width')
KERNELS: dict[str, Shape] = {f'kernels[{i}]': ('dim', 1, 3, 3) for i in range(3)}


def check_arguments(op: str, shapes: Mapping[str, Shape], tensors: Sequence[torch.Tensor | None]) -> None:
    """Check that an op's arguments are floating point tensors whose shapes fit each other.

    Args:
        op (str): Name of the op, for the message.
        shapes (Mapping[str, Shape]): For each argument's name its sizes: a number, or a name that stands for the same
            number wherever it is.
        tensors (Sequence[Tensor | None]): The arguments, in this order. Only ``delta_bias`` may be None.

    Raises:
        ValueError: If a shape does not fit, or the kernels are not three.
        TypeError: If an argument is not a floating point tensor.
    """
    surplus = len(tensors) - len(shapes)
    if surplus:
        raise ValueError(f'{op}: kernels must be three tensors, of dilation 1, 3 and 5, but are {3 + surplus}')
    sizes: dict[str | int, int] = {}
    for (name, shape), tensor in zip(shapes.items(), tensors):
        if tensor is None and name == 'delta_bias':
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f'{op}: {name} must be a floating point tensor, but is {kind}')
        fits = len(shape) == tensor.dim()
        for axis, size in zip(shape, tensor.shape):
            fits = fits and size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
        if not fits:
            wanted = ', '.join([str(sizes.get(axis, '*') if isinstance(axis, str) else axis) for axis in shape])
            raise ValueError(f'{op}: {name} must have the shape ({wanted}), but has {tuple(tensor.shape)}')


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype an op computes in: float64 where one of the tensors has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def run(op: str, reference: ModuleType, *arguments: Any) -> Any:
    """Run an op on the backend that :func:`dispatch.choose` chooses.

    Args:
        op (str): Name of the op.
        reference (ModuleType): Has the truth under that name.
        *arguments (object): The op's arguments.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    backend = dispatch.choose(*tensors)
    if backend != 'reference':
        return getattr(getattr(torch.ops, f'mmspatialmamba_{backend}'), op)(*arguments)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return getattr(reference, op)(*arguments)


def like_inputs(*inputs: Any) -> Gradients:
    """Allocate the gradient of each input, in its dtype and memory format.

    The gradient of an absent bias has one value for each row of A, the third input.
    """
    A = inputs[2]
    return tuple(A.new_empty(A.shape[0]) if t is None else torch.empty_like(t) for t in inputs)


def _torch_kernel(function: Callable, fake: Callable) -> Callable:
    """Make a kernel of plain PyTorch: its results are copied to fresh tensors of the fake's dtypes and strides."""

    def kernel(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            results = function(*args)
        out = fake(*args)
        return out.copy_(results) if isinstance(out, torch.Tensor) else tuple(o.copy_(r) for o, r in zip(out, results))

    return kernel


def _triton_kernel(op: str, name: str) -> Callable:
    """Make a kernel that imports its module, and with it Triton, when it is first called."""

    def kernel(*args):
        return getattr(import_module(f'{__package__}.{op}.triton'), name)(*args)

    return kernel


def _register_autograd(namespace: str, op: str, truth: Callable, tensors: int, keeps_output: bool) -> None:
    """Differentiate an op by its backward op, and that, for derivatives of any higher order, by the truth.

    What is kept for the backward pass is the inputs, of which the first ``tensors`` are tensors or None, and of some
    ops the output.
    """
    backward_op = getattr(getattr(torch.ops, namespace), f'{op}_backward')
    first_input = 2 if keeps_output else 1

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors], *([output] if keeps_output else []))
        ctx.constants = inputs[tensors:]

    def backward(ctx, grad):
        saved = ctx.saved_tensors
        inputs, output = saved[:tensors], saved[tensors:]
        gradients = backward_op(grad, *output, *inputs, *ctx.constants)
        gradients = [None if t is None else gradient for t, gradient in zip(inputs, gradients)]
        return *gradients, *[None] * len(ctx.constants)

    def setup_second_context(ctx, inputs, output):
        inputs = [inputs[0], *inputs[first_input:]]
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.constants = inputs[tensors + 1 :]

    def second_backward(ctx, *grads):
        saved, create_graph = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
            # A view ends this differentiation at the input, and leads the next one on to what the input came from.
            inputs = [
                t if t is None else t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in saved
            ]
            present = [t for t in inputs if t is not None]
            output = truth(*inputs[1:], *ctx.constants)
            first = torch.autograd.grad(output, present[1:], present[0], create_graph=True)
            pairs = [(f, g) for f, g in zip(first, grads) if g is not None and f.requires_grad]
            outputs, output_grads = zip(*pairs)
            second = torch.autograd.grad(
                outputs, present, output_grads, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        absent = [None] * (len(inputs) - len(present) + len(ctx.constants))
        return second[0], *[None] * (first_input - 1), *second[1:], *absent

    compat.register_autograd(f'{namespace}::{op}', backward, setup_context=setup_context)
    compat.register_autograd(f'{namespace}::{op}_backward', second_backward, setup_context=setup_second_context)


_libraries: list[torch.library.Library] = []


def register(
    op: str,
    arguments: str,
    reference: ModuleType,
    fake: Callable[..., torch.Tensor],
    gradients_fake: Callable[..., Gradients] = like_inputs,
    *,
    keeps_output: bool = False,
    backends: Sequence[str] = ('torch', 'triton', 'native'),
) -> None:
    """Register an op, which returns one tensor, and its backward op, with each backend that is there.

    The backward op takes the gradient of the output, the output if asked for, and the op's arguments. It returns a
    gradient for each tensor among these, also for a bias that is absent.

    Args:
        op (str): Name of the op.
        arguments (str): Its arguments as in a schema: tensors first, of them at most the last optional.
        reference (ModuleType): Has the truth under the name of the op. Its backward, as ``{op}_backward``, is needed
            for the torch backend alone.
        fake (Callable): Allocates the output for the op's arguments.
        gradients_fake (Callable): Allocates the gradients for the tensors. Defaults to :func:`like_inputs`.
        keeps_output (bool): Whether the backward op takes the output. Defaults to False.
        backends (Sequence[str]): The backends that have the op. Defaults to all three.
    """
    tensors = arguments.count('Tensor')
    first_input = 2 if keeps_output else 1
    fakes: dict[str, Callable] = {
        op: fake,
        f'{op}_backward': lambda *args: gradients_fake(*args[first_input : first_input + tensors]),
    }
    saved = 'Tensor output, ' if keeps_output else ''
    schemas = {
        op: f'({arguments}) -> Tensor',
        f'{op}_backward': f'(Tensor grad, {saved}{arguments}) -> ({", ".join(["Tensor"] * tensors)})',
    }
    for backend in backends:
        if dispatch.MISSING[backend]:
            continue
        namespace = f'mmspatialmamba_{backend}'
        if backend != 'native':
            library = torch.library.Library(namespace, 'FRAGMENT')
            _libraries.append(library)
            for name, schema in schemas.items():
                library.define(name + schema)
                is_torch = backend == 'torch'
                kernel = _torch_kernel(getattr(reference, name), fakes[name]) if is_torch else _triton_kernel(op, name)
                library.impl(name, kernel, 'CompositeExplicitAutograd')
        for name in schemas:
            compat.register_fake(f'{namespace}::{name}', fakes[name])
        _register_autograd(namespace, op, getattr(reference, op), tensors, keeps_output)
