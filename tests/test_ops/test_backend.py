import os
import subprocess
import sys

import pytest
import torch

from mmspatialmamba import ops

CALL = 'ops.selective_scan(x, x, -x[0, :, :1], x[:, :1])'
SCAN = f'import torch; from mmspatialmamba import ops; x = torch.ones(1, 2, 3); {CALL}'


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_torch_is_available():
    assert 'torch' in ops.available_backends()


def test_use_backend_refuses_what_is_not_there():
    message = r"use_backend asks for the backend 'cudnn', which this installation does not have; .*torch"
    with pytest.raises(ValueError, match=message), ops.use_backend('cudnn'):
        pass


def test_use_backend_ends_with_its_block():
    x = torch.ones(1, 2, 3)
    with ops.use_backend('torch'):
        inside = ops.selective_scan(x, x, -x[0, :, :1], x[:, :1])
    torch.testing.assert_close(ops.selective_scan(x, x, -x[0, :, :1], x[:, :1]), inside)


def test_environment_variable_chooses():
    assert run_python(SCAN, MMSPATIALMAMBA_BACKEND='torch').returncode == 0


def test_environment_variable_of_an_unknown_backend_is_an_error():
    result = run_python(SCAN, MMSPATIALMAMBA_BACKEND='cudnn')
    assert result.returncode == 1
    assert "environment variable MMSPATIALMAMBA_BACKEND asks for the backend 'cudnn'" in result.stderr


def test_automatic_choice_is_logged_once():
    code = f"import logging; logging.basicConfig(level='INFO'); {SCAN}; {CALL}"
    assert run_python(code).stderr.count("INFO:mmspatialmamba:ops run on the 'torch' backend") == 1


def test_ops_need_torch_alone():
    code = (
        'import sys; blocked = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "triton")\n'
        'class Block:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name.split(".")[0] in blocked: raise ModuleNotFoundError(name)\n'
        'sys.meta_path.insert(0, Block())\n'
        'import importlib.util; find = importlib.util.find_spec\n'
        'importlib.util.find_spec = lambda n, p=None: None if n in blocked else find(n, p)\n'
    )
    result = run_python(code + SCAN)
    assert result.returncode == 0, result.stderr
