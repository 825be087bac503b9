"""Allow-list for reading mmengine's training checkpoints by ``torch.load`` with ``weights_only``, or as strictly.

Below torch 2.6 this module is the ``pickle_module`` of ``torch.load``, which uses ``Unpickler`` and ``load`` in it.
"""

from __future__ import annotations

import codecs
import pickle
import sys
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from .. import compat

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


@cache
def _training_globals() -> dict[str, Callable]:
    """List what :func:`allow_training_checkpoints` allows, by the names that a checkpoint has for it."""
    reconstruct, scalar = np.array(0.0).__reduce__()[0], np.float64(0.0).__reduce__()[0]
    classes = *_METHODS, np.ndarray, np.dtype, *(type(np.dtype(name)) for name in ('float32', 'float64', 'int64'))
    return {
        **{f'{cls.__module__}.{cls.__qualname__}': cls for cls in classes},
        'builtins.getattr': _stored_method,
        'numpy.core.multiarray._reconstruct': reconstruct,
        'numpy._core.multiarray._reconstruct': reconstruct,
        'numpy.core.multiarray.scalar': scalar,
        'numpy._core.multiarray.scalar': scalar,
        'yacs.config.CfgNode': OrderedDict,
    }


def allow_training_checkpoints() -> None:
    """Add to torch's allow-list what mmengine's training checkpoints hold besides tensors and plain containers.

    Since torch 2.6 ``torch.load`` refuses every class that it does not know; before, it runs whatever a file asks for,
    and this does nothing. mmengine saves log histories (``HistoryBuffer``: float64 and int64 arrays, and its own
    statistics methods), NumPy scalars (the ETA; a best score, float32 from mmseg's mIoU) and the annealing function of
    a one-cycle schedule. Exactly these are added, under the module names of NumPy 1 and NumPy 2. ``getattr``, by which
    pickle refers to a method, becomes a look-up of those methods. The settings in the original release's checkpoints, a
    ``yacs`` ``CfgNode``, become an ``OrderedDict``.

    Security: ``HistoryBuffer.__setstate__`` stores the callables it is given as statistics methods of the whole
    process, so a forged file can spoil logged statistics. Each of those callables is limited to this list and torch's
    own, so it cannot run code.
    """
    if compat.LOADS_WEIGHTS_ONLY:
        torch.serialization.add_safe_globals([(value, name) for name, value in _training_globals().items()])


def load_weights_only(path: str | Path, map_location: object = None) -> object:
    """Load a file by ``torch.load``, unpickling tensors, plain containers and what this module lists, and no more."""
    if compat.LOADS_WEIGHTS_ONLY:
        return torch.load(path, map_location=map_location, weights_only=True)
    return load_below_2_6(path, map_location)


def load_below_2_6(path: str | Path, map_location: object = None) -> object:
    """Load a file as strictly as torch does since 2.6. Before, its list cannot be extended as needed.

    torch below 2.6 runs the program in a TorchScript archive, and extracts a tar archive, with ``weights_only`` too.
    Both are refused. Only torch's private reader is sure to find in a zip archive what ``torch.load`` finds there.
    """
    try:
        records = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no zip archive
        records = ()
    if 'constants.pkl' in records or tarfile.is_tarfile(path):
        raise pickle.UnpicklingError('it is a TorchScript or tar archive')
    return torch.load(path, map_location=map_location, pickle_module=sys.modules[__name__], weights_only=False)


@cache
def _known_globals() -> dict[str, Callable]:
    """List what torch 2.6 allows and what this module does; torch 2.1 has a shorter list, in the same private place."""
    from torch._weights_only_unpickler import _get_allowed_globals

    later = {f'builtins.{cls.__name__}': cls for cls in (bytearray, complex, set)}
    # Protocol 2 of pickle has no bytes, but calls that encode strings.
    later.update({'_codecs.encode': codecs.encode, 'collections.Counter': Counter, 'torch.device': torch.device})
    return {**_get_allowed_globals(), **later, **_training_globals()}


class Unpickler(pickle._Unpickler):
    """Unpickler that calls and changes nothing but what is listed, for the ``pickle_module`` of ``torch.load``.

    It is derived from pickle's private class in Python, whose operations are in a table (tried with Python 3.11; the
    same since 3.9): the public one lets a file set attributes of every class and function that it may name.
    """

    @staticmethod
    def _check(what: object, known: Iterable) -> None:
        if not any(what is each for each in known):
            raise pickle.UnpicklingError(f'GLOBAL {what} is no part of weights')

    def find_class(self, module: str, name: str) -> Callable:
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        if path not in _known_globals():
            raise pickle.UnpicklingError(f'GLOBAL {path} is no part of weights')
        return _known_globals()[path]

    def load_reduce(self) -> None:
        self._check(self.stack[-2], _known_globals().values())
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check(self.stack[-2], _training_globals().values())
        super().load_newobj()

    def load_build(self) -> None:
        self._check(type(self.stack[-2]), _training_globals().values())
        super().load_build()

    def load_binpersid(self) -> None:
        if self.stack[-1][0] != 'storage':
            raise pickle.UnpicklingError('it refers to something else than storages')
        super().load_binpersid()

    def refuse(self) -> None:
        raise pickle.UnpicklingError('it holds an operation that weights do not need')

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
        **dict.fromkeys(pickle.INST + pickle.OBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4, refuse),
    }


def load(file: BinaryIO, **options: str) -> object:
    """Load one of the small objects before and after that with the tensors in files of torch before 1.6."""
    return Unpickler(file, **options).load()
