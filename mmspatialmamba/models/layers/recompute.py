from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmspatialmamba import compat


class _CopiedStatistics:
    """Context in which the BatchNorm layers of a module update copies of their running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
        for norm, name, buffer in self.buffers:
            setattr(norm, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for norm, name, buffer in self.buffers:
            setattr(norm, name, buffer)


def recompute(module: nn.Module, function: Callable, x: torch.Tensor) -> torch.Tensor:
    """Checkpoint a module's forward pass: recompute its activations in backward instead of keeping them.

    BatchNorm layers update their running statistics once. Both passes run in the context of the first, on its backend.
    The module must be the same in both: hooks added or removed in between are an error.

    Args:
        module (nn.Module): The module.
        function (Callable): Its forward pass, from ``x``.
        x (Tensor): The input.

    Returns:
        Tensor: The output of ``function``.
    """
    if not torch.is_grad_enabled():
        return function(x)
    if compat.is_compiling():
        # Compiled code updates the statistics at its end, once.
        return checkpoint(function, x, use_reentrant=False)
    context = copy_context()
    return checkpoint(
        lambda x: context.copy().run(function, x),
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _CopiedStatistics(module)),
    )
