"""Argument checks shared by the ops: one clear line each."""

from __future__ import annotations

import torch


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple) -> None:
    """Raise ValueError unless ``tensor`` has the ``expected`` shape and a floating dtype; None stands for any size.

    Raises:
        ValueError: If the shape differs.
        TypeError: If ``tensor`` is not a floating point tensor.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f'{op}: {name} must be a floating point tensor, but is {kind}')
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected)):
        wanted = ', '.join('*' if e is None else str(e) for e in expected)
        raise ValueError(f'{op}: {name} must have the shape ({wanted}), but has {shape}')


def check_kernels(op: str, kernels, alpha: torch.Tensor, dim: int) -> None:
    """Raise unless ``kernels`` are three (dim, 1, 3, 3) tensors and ``alpha`` is (3,).

    Raises:
        ValueError: If the number or a shape differs.
        TypeError: If one of them is not a floating point tensor.
    """
    if len(kernels) != 3:
        raise ValueError(f'{op}: kernels must be three tensors, of dilation 1, 3 and 5, but are {len(kernels)}')
    for i, kernel in enumerate(kernels):
        check_shape(op, f'kernels[{i}]', kernel, (dim, 1, 3, 3))
    check_shape(op, 'alpha', alpha, (3,))
