import os
import subprocess
import sys
from ast import literal_eval

import pytest

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def run_python(code, cwd):
    result = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('library', LIBRARIES)
def test_resolves_from_any_directory(tmp_path, library):
    config = tmp_path / 'config.py'
    config.write_text(
        f'default_scope = {library!r}\n'
        "custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)\n"
        "model = dict(type='SpatialMamba', drop_path_rate=0.1)\n"
    )
    code = (
        'import sys\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import init_default_scope\n'
        f'init_default_scope({library!r})\n'
        f'from {library}.registry import MODELS\n'
        "by_scope = type(MODELS.build(dict(type='mmspatialmamba.SpatialMamba'))).__name__\n"
        f'cfg = Config.fromfile({str(config)!r})\n'
        'by_config = type(MODELS.build(cfg.model)).__name__\n'
        "upstream = type(MODELS.build(dict(type='MM_SpatialMamba'))).__name__\n"
        'print(by_scope, by_config, upstream)'
    )
    assert run_python(code, os.sep).splitlines()[-1] == 'SpatialMamba SpatialMamba MM_SpatialMamba'


IMPORT = """
import sys

import mmengine.analysis, mmengine.hooks, mmengine.infer, mmengine.model, mmengine.optim, mmengine.runner
import torch, torch.utils.flop_counter
from mmengine import registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader

REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
for each in REGISTRIES:
    each.import_from_location()


def functions():
    '''What modules and classes of torch, mmengine and Python hold under each name.'''
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith('mmspatialmamba'):
            found.update({(name, key): value for key, value in vars(module).items() if callable(value)})
    classes = [(key, value) for key, value in found.items() if isinstance(value, type)]
    for key, cls in classes:
        methods = {name: value for name, value in vars(cls).items() if callable(value) or hasattr(value, '__func__')}
        found.update({(*key, name): value for name, value in methods.items()})
    return found


def tables():
    complexity = sys.modules['mmengine.analysis.complexity_analysis']
    return {
        'checkpoint loaders': dict(CheckpointLoader._schemes),
        'finders': {str(finder): finder for finder in sys.meta_path},
        'multiply-adds': dict(complexity._DEFAULT_SUPPORTED_FLOP_OPS),
        'packages': dict(MODULE2PACKAGE),
        **{f'registry {each.name}': dict(each.module_dict) for each in REGISTRIES},
    }


before, kept = tables(), functions()
import mmspatialmamba, mmspatialmamba.models
after, now = tables(), functions()

print([key for key, value in kept.items() if now.get(key) is not value])
print([(name, key) for name in before for key, value in before[name].items() if after[name].get(key) is not value])
new = {name: {k: v for k, v in table.items() if k not in before[name]} for name, table in after.items()}
print({name: list(new.pop(name)) for name in ('checkpoint loaders', 'finders', 'multiply-adds', 'packages')})
values = [value for table in new.values() for value in table.values()]
print({value.__module__.split('.')[0] for value in values}, mmspatialmamba.models.SpatialMamba in values)
print([name for name in ('mmdet', 'mmseg', 'mmpretrain', 'mmcv._ext') if name in sys.modules])
"""


def test_import_registers_and_changes_nothing_else(tmp_path):
    """``import mmspatialmamba`` leaves every function and table of torch and mmengine, but for its own entries."""
    changed, replaced, tables, packages, libraries = run_python(IMPORT, tmp_path).splitlines()[-5:]
    assert (changed, replaced, libraries) == ('[]', '[]', '[]')
    assert literal_eval(tables) == {
        'checkpoint loaders': ['ema://'],
        'finders': [],
        'multiply-adds': [],
        'packages': ['mmspatialmamba'],
    }
    assert packages == "{'mmspatialmamba'} True"


@pytest.mark.slow
def test_apis_imported_by_name_read_every_checkpoint(tmp_path):
    code = (
        'import mmspatialmamba.apis\n'
        'from mmengine.runner import CheckpointLoader\n'
        "print([CheckpointLoader._schemes[p].__module__ for p in ('', 'http://', 'https://', 'mmspatialmamba://')])"
    )
    read, ask = 'mmspatialmamba.checkpoint.reader', 'mmspatialmamba.apis'
    assert run_python(code, tmp_path).splitlines()[-1] == str([read, read, read, ask])


def test_builds_and_runs_without_compiled_ops(tmp_path):
    """What mmcv-lite is: mmcv without ``mmcv.ops`` and ``mmcv._ext``."""
    code = (
        'import sys\n'
        'class Lite:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        "        if name in ('mmcv.ops', 'mmcv._ext', 'mmdet', 'mmseg', 'mmpretrain'):\n"
        '            raise ModuleNotFoundError(name)\n'
        'sys.meta_path.insert(0, Lite())\n'
        'import torch\n'
        'from mmspatialmamba.models import SpatialMamba\n'
        'backbone = SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1))).eval()\n'
        'print(len(backbone(torch.ones(1, 3, 32, 32))))'
    )
    assert run_python(code, tmp_path).splitlines()[-1] == '4'
