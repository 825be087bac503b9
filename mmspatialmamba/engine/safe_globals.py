"""Allow-list for reading mmengine's training checkpoints by ``torch.load`` with ``weights_only``."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

_METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _stored_method(owner: type, name: str):
    """Look up ``owner.name`` in place of ``getattr``, for the few methods that mmengine stores, and no others."""
    if any(owner is cls and name in names for cls, names in _METHODS.items()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}, which no mmengine checkpoint '
        'holds: load it only if you trust its author, by torch.load(..., weights_only=False)'
    )


def allow_training_checkpoints() -> None:
    """Add to torch's allow-list what mmengine's training checkpoints hold besides tensors and plain containers.

    Since torch 2.6 ``torch.load`` refuses every class that it does not know; older versions have no such list, and this
    does nothing there. mmengine saves log histories (``HistoryBuffer``: float64 and int64 arrays, and its own
    statistics methods), NumPy scalars (the ETA; a best score, float32 from mmseg's mIoU) and the annealing function of
    a one-cycle schedule. Exactly these are added, under the module names of NumPy 1 and NumPy 2. ``getattr``, by which
    pickle refers to a method, becomes a look-up of those methods. The settings in the original release's checkpoints, a
    ``yacs`` ``CfgNode``, become an ``OrderedDict``.

    Security: ``HistoryBuffer.__setstate__`` stores the callables it is given as statistics methods of the whole
    process, so a forged file can spoil logged statistics. Each of those callables is limited to this list and torch's
    own, so it cannot run code.
    """
    if torch.__version__ < (2, 6):
        return
    reconstruct, scalar = np.array(0.0).__reduce__()[0], np.float64(0.0).__reduce__()[0]
    torch.serialization.add_safe_globals(
        [
            *_METHODS,
            (_stored_method, 'builtins.getattr'),
            (reconstruct, 'numpy.core.multiarray._reconstruct'),
            (reconstruct, 'numpy._core.multiarray._reconstruct'),
            (scalar, 'numpy.core.multiarray.scalar'),
            (scalar, 'numpy._core.multiarray.scalar'),
            (OrderedDict, 'yacs.config.CfgNode'),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(name)) for name in ('float32', 'float64', 'int64')),
        ]
    )
