"""Which backend runs an op: the only place that chooses."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

from . import torch_backend

_ENVIRONMENT_VARIABLE = 'MMSPATIALMAMBA_BACKEND'
_BACKENDS: dict[str, ModuleType] = {'torch': torch_backend}
_chosen: ContextVar[str | None] = ContextVar('mmspatialmamba_backend', default=None)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred one first."""
    return tuple(_BACKENDS)


def _check(name: str, asked_by: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(
            f'{asked_by} asks for the backend {name!r}, which this installation does not have; '
            f'choose one of: {", ".join(available_backends())}'
        )
    return name


@contextmanager
def use_backend(name: str):
    """Run the ops called inside the ``with`` block, by this thread or task, on one backend.

    Args:
        name (str): One of :func:`available_backends`.

    Raises:
        ValueError: If this installation does not have the backend.
    """
    token = _chosen.set(_check(name, 'use_backend'))
    try:
        yield
    finally:
        _chosen.reset(token)


@cache
def _automatic() -> str:
    name = available_backends()[0]
    logging.getLogger('mmspatialmamba').info('ops run on the %r backend', name)
    return name


def current_backend() -> ModuleType:
    """The backend of the next op: of ``use_backend``, else of ``MMSPATIALMAMBA_BACKEND``, else the preferred one.

    Raises:
        ValueError: If ``MMSPATIALMAMBA_BACKEND`` names a backend that this installation does not have.
    """
    name = _chosen.get()
    if name is None and _ENVIRONMENT_VARIABLE in os.environ:
        name = _check(os.environ[_ENVIRONMENT_VARIABLE], f'the environment variable {_ENVIRONMENT_VARIABLE}')
    return _BACKENDS[name or _automatic()]
