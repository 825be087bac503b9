"""Fully sharded training: a wrap policy, and a strategy whose checkpoints can be resumed."""

from __future__ import annotations

from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel

from mmspatialmamba.models.layers import SpatialMambaBlock


@FUNCTIONS.register_module()
def block_wrap_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Wrap each block of the backbone on its own: an ``auto_wrap_policy`` of ``FullyShardedDataParallel``.

    Args:
        module (nn.Module): The module.
        recurse (bool): Whether the question is to look into the module, or else to wrap it.
        nonwrapped_numel (int): Number of the module's parameters that are not wrapped yet.

    Returns:
        bool: The answer.
    """
    return recurse or isinstance(module, SpatialMambaBlock)


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """Version of mmengine's ``FSDPStrategy`` whose checkpoints can be resumed, with the same arguments.

    mmengine 0.10.7 passes the arguments of ``FullyShardedDataParallel.optim_state_dict_to_load`` in the order of torch
    2.0.0, so that resuming fails with later versions. torch 2.14 gathers an optimizer's averages one after the other in
    one buffer, and offloading to the CPU copies it on a GPU only: on a CPU all averages would be the last one.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        if get_device() == 'cpu' and isinstance(self.optim_state_dict_config, FullOptimStateDictConfig):
            self.optim_state_dict_config.offload_to_cpu = False

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer state that :meth:`optim_state_dict` returned."""
        optimizer = self.optim_wrapper.optimizer
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(sharded)
