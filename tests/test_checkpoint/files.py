"""Small checkpoints in the original release's forms."""

from __future__ import annotations

import os
from functools import cache

import torch
import weights
from torch import nn

from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.utils import to_upstream

ARCH = dict(embed_dims=8, depths=(1, 1, 2, 1))
CLASSES = 10


def small(arch=None, **kwargs) -> SpatialMamba:
    return SpatialMamba(arch or ARCH, **kwargs)


@cache
def _classifier_shapes(embed_dims: int, depths: tuple, classes: int) -> list:
    backbone = SpatialMamba(dict(embed_dims=embed_dims, depths=depths), out_indices=-1)
    last = backbone.num_stages - 1
    shapes = [(to_upstream(name, last), tuple(value.shape)) for name, value in backbone.state_dict().items()]
    return [*shapes, ('head.weight', (classes, backbone.out_channels[-1])), ('head.bias', (classes,))]


def classifier_state(arch=None, seed: int = 0, classes: int = CLASSES) -> dict:
    """A classifier's weights by the original release's names."""
    return weights.state_dict(_classifier_shapes(**(arch or ARCH), classes=classes), seed)


def backbone_state(arch=None, seed: int = 0, prefix: str = 'backbone.') -> dict:
    """A dense-prediction backbone's weights by the original release's names."""
    shapes = {to_upstream(name): value.shape for name, value in small(arch).state_dict().items()}
    return {prefix + name: value for name, value in weights.state_dict(list(shapes.items()), seed).items()}


def published_classifier(**kwargs) -> dict:
    """A classification checkpoint as the original release publishes them: weights, their average, training state."""
    model = classifier_state(**kwargs)
    optimizer = {'state': {0: {'exp_avg': torch.ones(3), 'step': 7}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]}
    return {
        'model': model,
        'model_ema': classifier_state(**{**kwargs, 'seed': 1}),
        'optimizer': optimizer,
        'lr_scheduler': {'base_values': [1e-3]},
        'epoch': 299,
        'max_accuracy': 83.5,
    }


def snapshot(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class Call:
    """An object that pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_broken(kind: str, folder) -> str:
    """Write a checkpoint that must be refused; were it run, a file ``witness`` would appear beside it.

    Args:
        kind (str): A key of :data:`BROKEN`.
        folder (Path): Where to write.

    Returns:
        str: Its path.
    """
    path = folder / f'{kind}.pth'
    good = {'model': classifier_state()}
    touch = f'touch {folder / "witness"}'
    if kind == 'directory':
        path.mkdir()
    elif kind == 'empty':
        path.touch()
    elif kind == 'text':
        path.write_text('<!DOCTYPE html><html>Not found</html>')
    elif kind == 'truncated':
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == 'truncated-legacy':
        torch.save(good, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == 'truncated-start':
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:10])
    elif kind == 'os.system':
        torch.save({**good, 'epoch': Call(os.system, touch)}, path)
    elif kind == 'legacy-os.system':
        torch.save({**good, 'epoch': Call(os.system, touch)}, path, _use_new_zipfile_serialization=False)
    elif kind == 'nested-reducer':
        torch.save({**good, 'optimizer': {'state': [Call(getattr, Call(eval, '__import__("os")'), 'system')]}}, path)
    elif kind == 'in-weights':
        torch.save(
            {'model': {**good['model'], 'norm.bias': Call(exec, f'open({str(folder / "witness")!r}, "w")')}}, path
        )
    elif kind == 'module':
        torch.save(nn.Linear(2, 2), path)
    elif kind == 'torchscript':
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif kind == 'tensor':
        torch.save(torch.ones(3), path)
    elif kind == 'no-tensors':
        torch.save({'epoch': 3, 'meta': {'time': 'now'}}, path)
    elif kind == 'dict-of-itself':
        loop = {}
        loop['loop'] = loop
        torch.save(loop, path)
    elif kind == 'string-weight':
        torch.save({'model': {**good['model'], 'norm.bias': 'zeros'}}, path)
    elif kind == 'nan':
        good['model']['layers.2.blocks.1.self_attention.Ds'][3] = float('nan')
        torch.save(good, path)
    elif kind == 'infinite':
        good['model']['patch_embed.conv1.conv.weight'][0, 0, 0, 0] = float('inf')
        torch.save(good, path)
    return str(path)


# What each file's message says, beside its name.
BROKEN = {
    'missing': 'there is no checkpoint',
    'directory': 'is a directory',
    'empty': 'is empty',
    'text': 'cut short or not a PyTorch checkpoint',
    'truncated': 'cut short or not a PyTorch checkpoint',
    'truncated-legacy': 'cut short or not a PyTorch checkpoint',
    'truncated-start': 'cut short or not a PyTorch checkpoint',
    'os.system': 'refused: loading it would run .*system',
    'legacy-os.system': 'refused: loading it would run .*system',
    'nested-reducer': 'refused: loading it would run .*(eval|getattr)',
    'in-weights': 'refused: loading it would run .*exec',
    'module': 'refused: loading it would run torch.nn.modules.linear.Linear',
    'torchscript': 'cut short or not a PyTorch checkpoint .*TorchScript',
    'tensor': 'holds a Tensor, no weights',
    'no-tensors': 'holds a dict without tensors, no weights',
    'dict-of-itself': 'holds a dict without tensors, no weights',
    'string-weight': "hold 'norm.bias', a str",
    'nan': r'stages\.2\.1\.mixer\.D holds NaN or infinity',
    'infinite': r'stem\.conv1\.conv\.weight holds NaN or infinity',
}
