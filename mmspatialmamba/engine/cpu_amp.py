from __future__ import annotations

from contextlib import contextmanager

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Optimizer wrapper for mixed precision on the CPU: backbone and neck in bfloat16, heads and losses in float32.

    mmengine's ``AmpOptimWrapper`` needs a GPU. bfloat16 has the range of float32, so the loss needs no scaling. Heads
    stay in float32 because mmcv's compiled ops (NMS, RoIAlign) take no bfloat16 on the CPU.

    Args:
        loss_scale (object): Not used; an argument of ``AmpOptimWrapper``, whose configs run as they are.
        dtype (str): 'bfloat16', the only choice. Defaults to 'bfloat16'.
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
        """Run ``model.extract_feat`` under autocast within the block; mmdet, mmseg and mmpretrain models have it."""
        module = model.module if is_model_wrapper(model) else model
        extract_feat = module.extract_feat

        def extract_in_bfloat16(*args, **kwargs):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                features = extract_feat(*args, **kwargs)
            if isinstance(features, torch.Tensor):
                return features.float()
            return tuple(feature.float() for feature in features)

        module.extract_feat = extract_in_bfloat16
        try:
            with super().optim_context(model):
                yield
        finally:
            del module.extract_feat
