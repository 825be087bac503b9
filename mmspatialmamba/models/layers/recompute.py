from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

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
    """Apply a module, and again in the backward pass, instead of storing its activations.

    BatchNorm layers update their running statistics once.

    Args:
        module (nn.Module): The module.
        function (Callable): What its forward pass computes from ``x``.
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


def _may_drop() -> bool:
    """Whether :func:`feed` may replace what autograd stores: not where somebody else does, such as a checkpoint."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def _call(autocast: AbstractContextManager, dtype: torch.dtype | None, function: Callable, inputs: tuple):
    with autocast:
        out = function(*inputs)
    return out if dtype is None else out.to(dtype)


class _Again:
    """Computes a tensor once more, and once for all who have stored it, if they ask one after the other.

    Args:
        function (Callable): Returns the tensor.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.stored = 0
        self._asked = 0
        self._tensor = None

    def __call__(self) -> torch.Tensor:
        tensor = self._tensor
        if tensor is None:
            with torch.no_grad():
                tensor = self.function()
        self._asked = (self._asked + 1) % self.stored
        self._tensor = tensor if self._asked else None
        return tensor


class Recomputed:
    """What a cheap function returns, for :func:`feed`, which need not store it for the backward pass.

    Args:
        function (Callable): Returns a tensor which depends on ``inputs`` and parameters alone. It should itself need no
            more than these for its backward pass, as a normalisation or an activation does.
        *inputs: What it takes, a tensor first.
        cheap (bool): Whether the function is cheap on these inputs; if not, its result is stored. Defaults to True.

    Attributes:
        tensor (Tensor): What it returned, under autocast in autocast's dtype.
        again (_Again, optional): Computes it once more; None where it is to be stored.
    """

    def __init__(self, function: Callable, *inputs: torch.Tensor | float | str, cheap: bool = True) -> None:
        self.again = None
        if not cheap or not _may_drop():
            self.tensor = function(*inputs)
            return
        device = inputs[0].device.type
        autocast, dtype = nullcontext(), None
        if torch.amp.is_autocast_available(device):
            enabled, fast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            autocast, dtype = torch.autocast(device, fast, enabled), fast if enabled else None
        self.again = _Again(partial(_call, autocast, dtype, function, inputs))
        self.tensor = self.again.function()


def feed(consumer: Callable, *sources: Recomputed) -> torch.Tensor:
    """``consumer`` of some tensors, which are computed again in its backward pass instead of being stored.

    Compiled code chooses itself what to compute again, and within a checkpoint everything is: there, and without
    gradients, this is a plain call.

    Args:
        consumer (Callable): Takes a tensor for each source, and does not write to it.
        *sources (Recomputed): Where the tensors come from.

    Returns:
        Tensor: What ``consumer`` returns.
    """
    tensors = [source.tensor for source in sources]
    again = {t.untyped_storage()._cdata: source.again for t, source in zip(tensors, sources) if source.again}
    if not again:
        return consumer(*tensors)

    def pack(tensor):
        function = again.get(tensor.untyped_storage()._cdata)
        if function is None:
            return tensor
        function.stored += 1
        return function, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        function, *geometry = packed
        return function().as_strided(*geometry)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return consumer(*tensors)
