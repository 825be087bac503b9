from __future__ import annotations

from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision training on the CPU: the forward pass under bfloat16 autocast.

    mmengine's ``AmpOptimWrapper`` needs a GPU. bfloat16 has float32's range, so that the loss needs no scaling.

    Args:
        loss_scale (object): Taken so that a config of ``AmpOptimWrapper`` runs as it is, and not used.
        dtype (str): 'bfloat16', the only one. Defaults to 'bfloat16'.
        **kwargs: Arguments of :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    def __init__(self, loss_scale: object = None, dtype: str = 'bfloat16', **kwargs) -> None:
        if dtype != 'bfloat16':
            raise ValueError(f"CPUAmpOptimWrapper: dtype must be 'bfloat16', but is {dtype!r}")
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the block under autocast, and do what the parent class does for gradient accumulation.

        Args:
            model (nn.Module): The model that is trained.
        """
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield
