"""What mmengine's FSDPStrategy lacks."""

from __future__ import annotations

from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel

from mmspatialmamba.models.layers import SpatialMambaBlock


@FUNCTIONS.register_module()
def block_wrap_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Let FullyShardedDataParallel gather the parameters of one block of the backbone at a time.

    Args:
        module (nn.Module): The module that may be wrapped.
        recurse (bool): Whether the question is to look into the module.
        nonwrapped_numel (int): Number of the module's parameters that are not wrapped yet.

    Returns:
        bool: Whether to do so.
    """
    return recurse or isinstance(module, SpatialMambaBlock)


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """mmengine's ``FSDPStrategy``, from whose checkpoints a training can be resumed. It takes the same arguments.

    mmengine 0.10.7 passes the arguments of ``FullyShardedDataParallel.optim_state_dict_to_load`` in the order they had
    in torch 2.0.0, so that resuming fails with later versions. torch 2.14 gathers an optimizer's averages one after the
    other in one buffer, of which offloading to the CPU makes a copy on a GPU only: on a CPU all would be the last one.

    Args:
        **kwargs: Arguments of :class:`mmengine._strategy.FSDPStrategy`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        if get_device() == 'cpu' and isinstance(self.optim_state_dict_config, FullOptimStateDictConfig):
            self.optim_state_dict_config.offload_to_cpu = False

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer.

        Args:
            state_dict (dict): What :meth:`optim_state_dict` returned.
        """
        optimizer = self.optim_wrapper.optimizer
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(sharded)
