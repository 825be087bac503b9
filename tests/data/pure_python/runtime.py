from mmengine.hooks import LoggerHook
from mmengine.optim import AmpOptimWrapper
from torch.nn import SyncBatchNorm
from torch.optim import AdamW

from mmspatialmamba.engine import LoadAuditHook, ResumableCheckpointHook

default_scope = None
norm_cfg = dict(type=SyncBatchNorm)
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=1),
    checkpoint=dict(type=ResumableCheckpointHook),
    load_audit=dict(type=LoadAuditHook),
)
optim_wrapper = dict(type=AmpOptimWrapper, dtype='float16', optimizer=dict(type=AdamW, lr=1e-3))
randomness = dict(seed=0)
