from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Optimizer wrapper for mixed precision on the CPU: backbones and necks in bfloat16, heads and losses in float32.

    mmengine's ``AmpOptimWrapper`` needs a GPU. bfloat16 has the range of float32, so the loss needs no scaling. Heads
    stay in float32 because mmcv's compiled ops (NMS, RoIAlign) take no bfloat16 on the CPU. Backbones and necks are
    found anywhere in the model: below wrappers, in teachers and in momentum encoders. A model that has none is run in
    bfloat16 as a whole.

    Args:
        loss_scale (object): Not used; an argument of ``AmpOptimWrapper``, whose configs run as they are.
        dtype (str | torch.dtype): 'bfloat16', the only choice. Defaults to 'bfloat16'.
        use_fsdp (bool): Not used either. Defaults to False.
        **kwargs: Arguments of :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    def __init__(
        self, loss_scale: object = None, dtype: str | torch.dtype = 'bfloat16', use_fsdp: bool = False, **kwargs
    ) -> None:
        if dtype not in ('bfloat16', torch.bfloat16):
            raise ValueError(f"CPUAmpOptimWrapper: dtype must be 'bfloat16', but is {dtype!r}")
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the backbones and necks of ``model`` under autocast within the block."""
        # TorchDynamo cannot trace a change of methods: with compile=True it compiles what is called, one by one.
        set_forwards = torch.compiler.disable(_set_forwards)
        previous = set_forwards({module: _in_bfloat16(module) for module in _find_trunks(model)})
        try:
            with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16, enabled=not previous):
                yield
        finally:
            set_forwards(previous)


def _set_forwards(forwards: dict[nn.Module, Callable | None]) -> dict[nn.Module, Callable | None]:
    """Replace modules' own ``forward``, None where the class's is used, and return the previous ones."""
    previous = {module: vars(module).pop('forward', None) for module in forwards}
    for module, forward in forwards.items():
        if forward is not None:
            module.forward = forward
    return previous


def _find_trunks(module: nn.Module, name: str = '') -> Iterator[nn.Module]:
    """Find a model's backbones and necks, by the attribute that holds them or the package that has their class."""
    kinds = {name.split('_')[-1], *type(module).__module__.split('.')}
    if kinds & {'backbone', 'backbones', 'neck', 'necks'}:
        yield module
    else:
        for name, child in module.named_children():
            yield from _find_trunks(child, name)


def _in_bfloat16(module: nn.Module) -> MethodType:
    """Make a ``forward`` under autocast, whose bfloat16 outputs become float32; a copy of the module gets its own."""
    own, shared = vars(module).get('forward'), type(module).forward

    @wraps(shared)
    def forward(self, *args, **kwargs):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outputs = own(*args, **kwargs) if own else shared(self, *args, **kwargs)
        return apply_to(outputs, lambda x: torch.is_tensor(x) and x.dtype == torch.bfloat16, torch.Tensor.float)

    return MethodType(forward, module)
