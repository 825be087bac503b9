"""What differs between the versions of PyTorch, 2.1 to the newest: no other file looks at the version.

Each difference names the version in which it ends. Where PyTorch has a function, it is that function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils import flop_counter

TORCH = tuple(int(number) for number in torch.__version__.split('.')[:2])
if TORCH < (2, 1):
    raise ImportError(f'mmspatialmamba needs PyTorch 2.1 or newer, but torch {torch.__version__} is installed')

# Libraries keep what they registered only as long as they live.
_libraries: list[torch.library.Library] = []


def _extend(name: str, kernel: Callable, key: str) -> None:
    """Give a registered op a kernel of a dispatch key."""
    namespace, op = name.split('::')
    library = torch.library.Library(namespace, 'IMPL')
    library.impl(op, kernel, key)
    _libraries.append(library)


def _is_compiling() -> bool:
    """Before 2.3 compiled code cannot tell."""
    return False


def _has_global_hooks() -> bool:
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def _is_autocast_available(device: str) -> bool:
    return device in ('cpu', 'cuda')


def _is_autocast_enabled(device: str) -> bool:
    return torch.is_autocast_enabled() if device == 'cuda' else torch.is_autocast_cpu_enabled()


def _get_autocast_dtype(device: str) -> torch.dtype:
    return torch.get_autocast_gpu_dtype() if device == 'cuda' else torch.get_autocast_cpu_dtype()


def _register_fake(name: str, fake: Callable) -> None:
    _extend(name, fake, 'Meta')


def _register_autograd(name: str, backward: Callable, *, setup_context: Callable) -> None:
    namespace, op = name.split('::')
    call = getattr(getattr(torch.ops, namespace), op).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = call(*args)
            setup_context(ctx, args, output)
            return output

    Differentiable.backward = staticmethod(backward)
    _extend(name, Differentiable.apply, 'Autograd')


def register_flop_formula(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """Register an op's formula with ``torch.utils.flop_counter``, which takes formulas from others since 2.2."""
    if TORCH < (2, 2):
        return
    flop_counter.register_flop_formula(op)(formula)
    # PyTorch 2.4 registers it under the op's overload, and looks for the op.
    flop_counter.flop_registry.setdefault(op, flop_counter.flop_registry.get(op.default))


COMPILES_CONTEXT_VARIABLES = TORCH >= (2, 14)
# torch.load with weights_only, and an allow-list for it that takes names as well as classes.
LOADS_WEIGHTS_ONLY = TORCH >= (2, 6)

# These two are private: PyTorch has no public functions that tell (2.1 to 2.14).
are_transforms_active = torch._C._are_functorch_transforms_active
has_global_hooks = getattr(nn.modules.module, '_has_any_global_hook', _has_global_hooks)

is_compiling = torch.compiler.is_compiling if TORCH >= (2, 3) else _is_compiling

if TORCH >= (2, 4):
    is_autocast_available = torch.amp.is_autocast_available
    is_autocast_enabled = torch.is_autocast_enabled
    get_autocast_dtype = torch.get_autocast_dtype
    register_fake = torch.library.register_fake
    register_autograd = torch.library.register_autograd
else:
    is_autocast_available = _is_autocast_available
    is_autocast_enabled = _is_autocast_enabled
    get_autocast_dtype = _get_autocast_dtype
    register_fake = _register_fake
    register_autograd = _register_autograd
