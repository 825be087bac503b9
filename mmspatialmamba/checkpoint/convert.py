"""Conversion of checkpoints from the original release and from other wrappings to mmengine's form."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable

import torch

from mmspatialmamba.models.utils.upstream import from_upstream, is_upstream

from .errors import CheckpointError

# Every block of Spatial-Mamba has these tensors, and no other network does.
_FUSION = re.compile(
    r'^(?P<prefix>.*\.)?(?:stages\.\d+\.\d+\.mixer\.fusion_|layers\.\d+\.blocks\.\d+\.self_attention\.state_fusion\.)'
)
_IN_BACKBONE = re.compile(r'^(?:stem|stages|downsamples|norm\d*|patch_embed|layers|outnorm\d+)\.')
_STAGE = re.compile(r'^(?:stages|layers)\.(\d+)\.')


def find_backbones(names: Iterable[str]) -> list[str]:
    """Find the Spatial-Mamba backbones among the names of a state dict, ours or the original release's.

    Args:
        names (Iterable[str]): Names of parameters and buffers.

    Returns:
        list[str]: Prefix of each backbone, such as 'backbone.'; '' where the names are a backbone's own.
    """
    matches = map(_FUSION.match, filter(lambda name: isinstance(name, str), names))
    return sorted({match['prefix'] or '' for match in matches if match})


def below(names: Iterable[str], prefix: str) -> list[str]:
    """Select the names that start with ``prefix``, and remove it."""
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]


def last_stage(names: Iterable[str]) -> int:
    """Find the index of the last stage among a backbone's names; -1 if there is none."""
    return max((int(match[1]) for match in map(_STAGE.match, names) if match), default=-1)


def is_classifier(names: Iterable[str], prefix: str) -> bool:
    """Tell a classifier by its names: no output norm but the last stage's, and no heads but a classifier's.

    Args:
        names (Iterable[str]): Our names of parameters and buffers.
        prefix (str): Prefix of the backbone.

    Returns:
        bool: Whether they are a classifier's.
    """
    names = list(names)
    backbone = below(names, prefix)
    norms = {int(match[1]) for match in map(re.compile(r'norm(\d+)\.').match, backbone) if match}
    others = {name.split('.')[0] for name in names if not name.startswith(prefix)}
    return norms <= {last_stage(backbone)} and others <= {'data_preprocessor', 'head', 'neck'}


def new_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a state dict that holds a Spatial-Mamba backbone to ours.

    Names of the original release and of earlier versions of this package become ours. A bare backbone gets the prefix
    'backbone.', the classifier's ``norm`` becomes the output norm of the file's last stage, and the original release's
    ``head`` becomes mmpretrain's ``head.fc``. The prefix 'module.' of wrappers for parallel training is removed.
    """
    new = {name: name[len('module.') :] if name.startswith('module.') else name for name in names}
    for prefix in sorted(find_backbones(new.values()), key=len):
        inside = below(new.values(), prefix)
        last = last_stage(inside) if is_upstream(inside) else None
        for key, name in new.items():
            short = name[len(prefix) :]
            if name.startswith(prefix) and _IN_BACKBONE.match(short):
                new[key] = (prefix or 'backbone.') + from_upstream(short, last)
            elif not prefix and last is not None and short in ('head.weight', 'head.bias'):
                new[key] = short.replace('head.', 'head.fc.')
    return new


def find_state(checkpoint: dict, source: str, average: bool = False) -> tuple[str | None, dict] | None:
    """Find the state dict that :func:`to_mmengine` converts, and its key: None if it is the checkpoint itself.

    Returns None if the checkpoint holds no Spatial-Mamba backbone. Raises ``CheckpointError`` if there is no average to
    take, or if the state dict holds anything but named tensors.
    """
    key = next((key for key in ('state_dict', 'model') if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint if key is None else checkpoint[key]
    if not find_backbones(state):
        return None
    if average and key == 'model' and isinstance(checkpoint.get('model_ema'), dict):
        state = checkpoint['model_ema']
    elif average and (key != 'state_dict' or 'ema_state_dict' not in checkpoint):
        raise CheckpointError(
            f'{source} holds no averaged weights (keys: {", ".join(map(str, list(checkpoint)[:6]))}): '
            'use the weights themselves, without ema:// or --ema'
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f'{source}: its weights hold {name!r}, a {type(value).__name__}, where only named tensors belong: '
                'use another file'
            )
    return key, state


def to_mmengine(checkpoint: dict, source: str = 'the checkpoint', average: bool = False) -> dict | None:
    """Convert a checkpoint that holds a Spatial-Mamba backbone to mmengine's form and our names.

    Args:
        checkpoint (dict): A classifier's checkpoint of the original release (``model``, ``model_ema``), a checkpoint of
            mmengine (``state_dict``) with our names or the original release's, or a bare state dict.
        source (str): Name of the checkpoint, for messages. Defaults to 'the checkpoint'.
        average (bool): Whether to take the averaged weights: the original release's ``model_ema``, or the
            ``state_dict`` of a training with mmengine's ``EMAHook``, which stores them there. Defaults to False.

    Returns:
        dict | None: ``state_dict``, ``meta``, and whatever else mmengine's checkpoint holds; ``checkpoint`` itself if
        it is in that form already; None if it holds no Spatial-Mamba backbone.

    Raises:
        CheckpointError: If there is no average to take, or if the state dict holds anything but named tensors.
    """
    found = find_state(checkpoint, source, average)
    if found is None:
        return None
    key, state = found
    names = new_names(state)
    if key == 'state_dict' and all(name == new for name, new in names.items()):
        return checkpoint
    renamed = OrderedDict((names[name], value) for name, value in state.items())
    if hasattr(state, '_metadata'):
        renamed._metadata = state._metadata
    return {**checkpoint, 'state_dict': renamed} if key == 'state_dict' else {'state_dict': renamed, 'meta': {}}
