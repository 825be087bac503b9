import os
import subprocess
import sys

import pytest

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def run_python(code, cwd):
    result = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize(
    'name, imports',
    [
        ('SpatialMamba', ['mmspatialmamba']),
        ('MM_SpatialMamba', ['mmspatialmamba']),
        ('mmspatialmamba.SpatialMamba', []),
    ],
    ids=['custom_imports', 'upstream-name', 'scope-alone'],
)
def test_resolves_from_any_directory(tmp_path, library, name, imports):
    config = tmp_path / 'config.py'
    config.write_text(
        f'default_scope = {library!r}\n'
        f'custom_imports = dict(imports={imports}, allow_failed_imports=False)\n'
        f'model = dict(type={name!r}, drop_path_rate=0.1)\n'
    )
    code = (
        'from mmengine.config import Config\n'
        'from mmengine.registry import init_default_scope\n'
        f'cfg = Config.fromfile({str(config)!r})\n'
        'init_default_scope(cfg.default_scope)\n'
        f'from {library}.registry import MODELS\n'
        'print(type(MODELS.build(cfg.model)).__name__)'
    )
    assert run_python(code, os.sep).splitlines()[-1] == name.rpartition('.')[2]


def test_import_pulls_in_no_library_and_no_compiled_ops(tmp_path):
    code = (
        'import sys, mmspatialmamba, mmspatialmamba.models\n'
        "print([m for m in ('mmdet', 'mmseg', 'mmpretrain', 'mmcv._ext') if m in sys.modules])"
    )
    assert run_python(code, tmp_path).splitlines()[-1] == '[]'


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
        'backbone = SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))\n'
        'print(len(backbone(torch.ones(1, 3, 32, 32))))'
    )
    assert run_python(code, tmp_path).splitlines()[-1] == '4'
