from .checkpoint_hook import ResumableCheckpointHook
from .cpu_amp import CPUAmpOptimWrapper
from .fsdp import ResumableFSDPStrategy, block_wrap_policy
from .layer_decay import LayerDecayOptimWrapperConstructor
from .load_audit_hook import LoadAuditHook
from .logger_hook import MainProcessLoggerHook
from .mesa_hook import MESAHook
from .prepare_hook import PrepareForCPUHook

__all__ = [
    'CPUAmpOptimWrapper',
    'LayerDecayOptimWrapperConstructor',
    'LoadAuditHook',
    'MESAHook',
    'MainProcessLoggerHook',
    'PrepareForCPUHook',
    'ResumableCheckpointHook',
    'ResumableFSDPStrategy',
    'block_wrap_policy',
]
