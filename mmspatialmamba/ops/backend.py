"""Which backend runs an op: the only place that chooses."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from . import library, torch_backend

_ENVIRONMENT_VARIABLE = 'MMSPATIALMAMBA_BACKEND'
_PREFERENCE = ('native', 'triton', 'torch')
_chosen: ContextVar[str | None] = ContextVar('mmspatialmamba_backend', default=None)


def _load_native() -> str | None:
    """Load the compiled ops, or say why not."""
    path = Path(__file__).with_name('_native.so')
    if not path.is_file():
        return 'its ops were not compiled; reinstall mmspatialmamba with MMSPATIALMAMBA_WITH_OPS=1 to compile them'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = ' '.join(str(error.__cause__ or error).split())
        return (
            f'its ops do not load with torch {torch.__version__} ({reason}); reinstall mmspatialmamba to compile them'
        )
    missing = library.missing('native')
    if missing:
        return f'its ops were compiled from another version, without {", ".join(missing)}; reinstall mmspatialmamba'
    library.register('native')
    return None


def _register_triton() -> str | None:
    """Register the Triton kernels, or say why not. Triton itself is imported by their first call."""
    if find_spec('triton') is None:
        return 'triton is not installed; run "pip install triton"'

    def late(op):
        def kernel(*args):
            from . import triton

            return getattr(triton, op)(*args)

        return kernel

    library.register('triton', {op: late(op) for op in library.SCHEMAS})
    return None


library.register('torch', torch_backend.KERNELS)
_MISSING = {'native': _load_native(), 'triton': _register_triton(), 'torch': None}


_NATIVE_DEVICES = frozenset(
    device
    for device, key in (('cpu', 'CPU'), ('cuda', 'CUDA'))
    if _MISSING['native'] is None
    and torch._C._dispatch_has_kernel_for_dispatch_key('mmspatialmamba_native::structure_aware_scan', key)
)


# The products for other processors are correct, but PyTorch's libraries know these better.
_HAS_FAST_PRODUCTS = 'cpu' in _NATIVE_DEVICES and torch.ops.mmspatialmamba_native.instruction_set() != 'baseline'


def why_unusable(name: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run on a device, with what would make it usable, or None where it can.

    Args:
        name (str): 'native', 'triton' or 'torch'.
        device (str): Type of the device, such as 'cpu' or 'cuda'.
        dtype (torch.dtype): The widest dtype among the inputs. Defaults to ``torch.float32``.
    """
    if _MISSING[name]:
        return _MISSING[name]
    if name == 'torch':
        return None
    if dtype == torch.float64:
        return 'it computes in float32; convert the float64 inputs, or use the torch backend'
    if name == 'native' and device not in _NATIVE_DEVICES:
        if device == 'cuda':
            return 'it was compiled without CUDA; reinstall mmspatialmamba with CUDA_HOME set, or with FORCE_CUDA=1'
        return f'it has no kernels for {device} tensors'
    if name == 'triton' and device != 'cuda' and os.environ.get('TRITON_INTERPRET') != '1':
        return f'it has no kernels for {device} tensors, except in its interpreter, with TRITON_INTERPRET=1'
    return None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred one first."""
    devices = ('cuda', 'cpu') if torch.cuda.is_available() else ('cpu',)
    return tuple(name for name in _PREFERENCE if any(why_unusable(name, device) is None for device in devices))


def _check(name: str, asked_by: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    if name not in _PREFERENCE:
        raise ValueError(f'{asked_by} asks for the backend {name!r}: it must be one of {", ".join(_PREFERENCE)}')
    reason = why_unusable(name, device, dtype)
    if reason:
        raise ValueError(f'{asked_by} asks for the backend {name!r}, which cannot run here: {reason}')
    return name


@contextmanager
def use_backend(name: str):
    """Run the ops called inside the ``with`` block, by this thread or task, on one backend.

    Args:
        name (str): 'native', 'triton' or 'torch'; :func:`available_backends` lists which of them run here.

    Raises:
        ValueError: If the backend cannot run on this machine, or, from an op inside the block, on its inputs.
    """
    if name not in available_backends():
        _check(name, 'use_backend', 'cuda' if torch.cuda.is_available() else 'cpu')
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@cache
def _log_choice(name: str, device: str) -> None:
    logging.getLogger('mmspatialmamba').info('ops on %s tensors run on the %r backend', device, name)


def _choose(*tensors: torch.Tensor) -> str:
    """The backend of the next call: ``use_backend``'s, else ``MMSPATIALMAMBA_BACKEND``'s, else the preferred one.

    Raises:
        ValueError: If a backend was asked for that cannot run on these inputs.
    """
    device, dtype = tensors[0].device.type, torch_backend.compute_dtype(*tensors)
    name = _chosen.get()
    if name is not None:
        _check(name, 'use_backend', device, dtype)
    elif _ENVIRONMENT_VARIABLE in os.environ:
        name = _check(
            os.environ[_ENVIRONMENT_VARIABLE], f'the environment variable {_ENVIRONMENT_VARIABLE}', device, dtype
        )
    else:
        name = next(name for name in _PREFERENCE if why_unusable(name, device, dtype) is None)
        if not torch.compiler.is_compiling():
            _log_choice(name, device)
    return name


def kernels(*tensors: torch.Tensor):
    """The ops of the backend that runs the next call on these inputs, a namespace of ``torch.ops``.

    Raises:
        ValueError: If a backend was asked for that cannot run on these inputs.
    """
    return getattr(torch.ops, f'mmspatialmamba_{_choose(*tensors)}')


def fuses_elementwise(*tensors: torch.Tensor) -> bool:
    """Whether the next call's backend has the fused element-wise ops: native, on the CPU."""
    return tensors[0].device.type == 'cpu' and _choose(*tensors) == 'native'


def fuses_layers(*tensors: torch.Tensor | None) -> bool:
    """Whether the next call's backend has layers as one op, and products: native, on a CPU with AVX2 or AVX-512.

    They need at least one channel and one pixel. Export and tracing want PyTorch's own.
    """
    return (
        _HAS_FAST_PRODUCTS
        and all(t is None or (t.device.type == 'cpu' and t.numel()) for t in tensors)
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and fuses_elementwise(tensors[0])
    )


def has_products(*tensors: torch.Tensor | None) -> bool:
    """Whether the next call's products are the native backend's: where it has any, for float32 without autocast."""
    return (
        all(t is None or t.dtype == torch.float32 for t in tensors)
        and not torch.is_autocast_enabled('cpu')
        and fuses_layers(*tensors)
    )
