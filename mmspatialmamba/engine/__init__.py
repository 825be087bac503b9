from .cpu_amp import CPUAmpOptimWrapper
from .logger_hook import MainProcessLoggerHook

__all__ = ['CPUAmpOptimWrapper', 'MainProcessLoggerHook']
