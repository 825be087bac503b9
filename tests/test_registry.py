import os
import subprocess
import sys

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
        'backbone = SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1))).eval()\n'
        'print(len(backbone(torch.ones(1, 3, 32, 32))))'
    )
    assert run_python(code, tmp_path).splitlines()[-1] == '4'
