from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorm layers within a module update copies of their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


def recompute(module: nn.Module, function: Callable, x: torch.Tensor) -> torch.Tensor:
    """Checkpoint a module's forward pass: recompute its activations in backward instead of keeping them.

    BatchNorm layers update their running statistics once.

    Args:
        module (nn.Module): The module.
        function (Callable): Its forward pass, from ``x``.
        x (Tensor): The input.

    Returns:
        Tensor: The output of ``function``.
    """
    if not torch.is_grad_enabled():
        return function(x)
    if torch.compiler.is_compiling():
        # Compiled code updates the statistics at its end, once.
        return checkpoint(function, x, use_reentrant=False)
    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(module)))
