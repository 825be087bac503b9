"""Which backend runs an op: the only place that chooses. The ops alone ask."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import compat

_ENVIRONMENT_VARIABLE = 'MMSPATIALMAMBA_BACKEND'
_PREFERENCE = ('native', 'triton', 'torch')
_NATIVE_OPS = ('selective_scan', 'state_fusion', 'structure_aware_scan', 'depthwise_conv', 'gated_layer_norm')
_chosen: ContextVar[str | None] = ContextVar('mmspatialmamba_backend', default=None)


class _ChosenForCompiler(threading.local):
    """What ``_chosen`` holds, for compilers that cannot read a context variable."""

    name: str | None = None


_chosen_for_compiler = _ChosenForCompiler()


def _load_native() -> str | None:
    """Load the compiled ops, or say why not."""
    path = Path(__file__).with_name('_native.so')
    if not path.is_file():
        return 'its ops were not compiled; reinstall mmspatialmamba with MMSPATIALMAMBA_WITH_OPS=1 to compile them'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        why = ' '.join(str(error.__cause__ or error).split())
        return f'its ops do not load with torch {torch.__version__} ({why}); reinstall mmspatialmamba to compile them'
    names = [name for op in _NATIVE_OPS for name in (op, f'{op}_backward')]
    missing = [name for name in names if not hasattr(torch.ops.mmspatialmamba_native, name)]
    if missing:
        return f'its ops were compiled from another version, without {", ".join(missing)}; reinstall mmspatialmamba'
    return None


def _find_triton() -> str | None:
    """Look for Triton, or say what would bring it here. The kernels' first call imports it."""
    return None if find_spec('triton') else 'triton is not installed; run "pip install triton"'


def _native_devices() -> frozenset[str]:
    """Types of the devices that the compiled ops have kernels for.

    PyTorch has no public function that tells (torch 2.14; the private one has been there since 1.8).
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {'cpu': 'CPU', 'cuda': 'CUDA'}
    op = 'mmspatialmamba_native::structure_aware_scan'
    return frozenset(device for device, key in keys.items() if not MISSING['native'] and has_kernel(op, key))


# Of each backend, why it is not here.
MISSING: dict[str, str | None] = {'native': _load_native(), 'triton': _find_triton(), 'torch': None}
_NATIVE_DEVICES = _native_devices()


def why_unusable(name: str, device: str, dtype: torch.dtype = torch.float32, transforming: bool = False) -> str | None:
    """Why a backend cannot run on a device, with what would make it usable, or None where it can.

    Args:
        name (str): 'native', 'triton' or 'torch'.
        device (str): Type of the device, such as 'cpu' or 'cuda'.
        dtype (torch.dtype): The widest dtype among the inputs. Defaults to ``torch.float32``.
        transforming (bool): Whether a function transform or forward-mode AD is on. Defaults to False.
    """
    if MISSING[name]:
        return MISSING[name]
    if name == 'torch':
        return None
    if transforming:
        return 'it has neither function transforms (torch.func, torch.vmap) nor forward-mode AD; use the torch backend'
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


def _check(name: str, asked_by: str, *call: Any) -> None:
    if name not in _PREFERENCE:
        raise ValueError(f'{asked_by} asks for the backend {name!r}: it must be one of {", ".join(_PREFERENCE)}')
    reason = why_unusable(name, *call)
    if reason:
        raise ValueError(f'{asked_by} asks for the backend {name!r}, which cannot run here: {reason}')


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the ``with`` block, by this thread or task, on one backend.

    Args:
        name (str): 'native', 'triton' or 'torch'; :func:`available_backends` lists which of them run here.

    Raises:
        ValueError: If the backend cannot run on this machine, or, from an op inside the block, on its inputs.
    """
    if name not in available_backends():
        _check(name, 'use_backend', 'cuda' if torch.cuda.is_available() else 'cpu')
    token, before = _chosen.set(name), _chosen_for_compiler.name
    _chosen_for_compiler.name = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_for_compiler.name = before


def _first_usable(device: str, dtype: torch.dtype, transforming: bool) -> str:
    return next(name for name in _PREFERENCE if why_unusable(name, device, dtype, transforming) is None)


@cache
def _automatic_choice(device: str, dtype: torch.dtype, transforming: bool) -> str:
    """Choose the preferred backend for a call, and log it, once a process."""
    name = _first_usable(device, dtype, transforming)
    logging.getLogger('mmspatialmamba').info('ops on %s tensors run on the %r backend', device, name)
    return name


def choose(*tensors: torch.Tensor | None) -> str:
    """Choose the next call's backend: ``use_backend``'s, else ``MMSPATIALMAMBA_BACKEND``'s, else the preferred one.

    PyTorch applies function transforms (``torch.func``, ``torch.vmap``) and forward-mode AD to no registered op with a
    gradient formula.

    Args:
        *tensors (Tensor, optional): The call's inputs; they are on one device.

    Returns:
        str: The name of the backend; under function transforms and forward-mode AD 'reference'.

    Raises:
        ValueError: If a backend was asked for that cannot run on these inputs.
    """
    compiling = compat.is_compiling()
    device, dtype = '', torch.float32
    for tensor in tensors:
        if tensor is None:
            continue
        device = device or tensor.device.type
        if tensor.dtype == torch.float64:
            dtype = torch.float64
    transforming = not compiling and (compat.are_transforms_active() or forward_ad._current_level >= 0)
    call = device, dtype, transforming
    readable = compat.COMPILES_CONTEXT_VARIABLES or not compiling
    if (name := _chosen.get() if readable else _chosen_for_compiler.name) is not None:
        _check(name, 'use_backend', *call)
    elif (name := os.environ.get(_ENVIRONMENT_VARIABLE)) is not None:
        _check(name, f'the environment variable {_ENVIRONMENT_VARIABLE}', *call)
    else:
        name = _first_usable(*call) if compiling else _automatic_choice(*call)
    return 'reference' if transforming else name
