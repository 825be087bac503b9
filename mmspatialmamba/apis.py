"""Names of this package's models for mmpretrain, mmdet and mmseg, whichever of them are installed.

``import mmspatialmamba.apis`` does three things that ``import mmspatialmamba`` does not:

- mmpretrain's ``list_models``, ``get_model`` and ``inference_model``, mmdet's ``DetInferencer`` and mmseg's
  ``MMSegInferencer`` take the names of the config files, without ``.py``. mmpretrain keeps its models in a class, and
  is imported for it. mmdet and mmseg read metafiles by a method of mmengine's ``BaseInferencer``, which is replaced.
- mmengine reads every checkpoint of the process by :func:`mmspatialmamba.checkpoint.read_checkpoint`, so that these
  functions, ``init_detector`` and ``init_model`` take any file that ``load_from`` takes beside ``LoadAuditHook``.
- A model's own weights (``pretrained=True``, the default of ``inference_model``, or an inferencer without ``weights``)
  are an error that says where to get them: the original release publishes no URL for each file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mmengine.fileio import load
from mmengine.infer import BaseInferencer
from mmengine.runner import CheckpointLoader

from .checkpoint import register_checkpoint_loaders

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent
_FOLDERS = {'mmdet': 'detection', 'mmseg': 'segmentation'}
_SCHEME = 'mmspatialmamba://'
_models_of_libraries = BaseInferencer._get_models_from_metafile


def _models(folder: str) -> Iterator[dict]:
    """Read the entries of a metafile in ``configs``, with the absolute paths of the configs, and with weights."""
    for model in load(_ROOT / 'configs' / folder / 'metafile.yml')['Models']:
        weights = model.get('Weights', f'{_SCHEME}{folder}/{model["Name"]}')
        yield {**model, 'Config': str(_ROOT / model['Config']), 'Weights': weights}


def _get_models_from_metafile(dir: str) -> Iterator[dict]:
    """Read the metafile entries of the library whose ``model-index.yml`` is in ``dir``: first ours, then its own."""
    for library, folder in _FOLDERS.items():
        if library in sys.modules and BaseInferencer._get_repo_or_mim_dir(library) == dir:
            yield from _models(folder)
    yield from _models_of_libraries(dir)


def load_from_metafile(filename: str, map_location: str | None = None) -> None:
    """Say how to get the weights of the model ``mmspatialmamba://FOLDER/NAME``, which has none to download.

    Raises:
        FileNotFoundError: Always.
    """
    folder, name = filename[len(_SCHEME) :].split('/')
    (model,) = (model for model in _models(folder) if model['Name'] == name)
    source = model.get('Converted From', {}).get('Weights')
    way = f"download the original release's file from {source}" if source else 'train it'
    argument = 'pretrained' if folder == 'classification' else 'weights'
    raise FileNotFoundError(f'{name} has no weights to download: {way}, then pass {argument}=FILE')


def _register_in_mmpretrain() -> None:
    from mmpretrain.apis.model import ModelHub

    ModelHub.register_model_index(_ROOT / 'configs/classification/metafile.yml', config_prefix=_ROOT)
    for model in _models('classification'):
        ModelHub._models_dict[model['Name'].lower()].weights = model['Weights']


register_checkpoint_loaders()
CheckpointLoader.register_scheme(prefixes=_SCHEME, loader=load_from_metafile)
BaseInferencer._get_models_from_metafile = staticmethod(_get_models_from_metafile)
if find_spec('mmpretrain') is not None:
    _register_in_mmpretrain()
