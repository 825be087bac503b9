import os
import platform
import subprocess
import sys

import pytest
import torch

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.ops import dispatch
from mmspatialmamba.ops.dispatch import why_unusable

SCAN = (
    'import torch; from mmspatialmamba import ops; x = torch.ones(1, 2, 3); '
    'ops.selective_scan(x, x, -x[0, :, :1], x[:, :1])'
)


def scan(dtype=torch.float32):
    x = torch.ones(1, 2, 3, dtype=dtype)
    return ops.selective_scan(x, x, -x[0, :, :1], x[:, :1])


@pytest.fixture(autouse=True)
def fresh_choice():
    """A test may change what is there."""
    dispatch._automatic_choice.cache_clear()
    yield
    dispatch._automatic_choice.cache_clear()


@pytest.fixture
def with_native(monkeypatch):
    """Nobody asks for a backend, and native is there for CPU tensors."""
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    monkeypatch.setitem(dispatch.MISSING, 'native', None)
    monkeypatch.setattr(dispatch, '_NATIVE_DEVICES', frozenset({'cpu'}))


def test_torch_is_available_and_comes_last():
    assert ops.available_backends()[-1] == 'torch'


def test_use_backend_refuses_an_unknown_name():
    message = r"use_backend asks for the backend 'cudnn': it must be one of native, triton, torch"
    with pytest.raises(ValueError, match=message), ops.use_backend('cudnn'):
        pass


def test_use_backend_ends_with_its_block():
    with ops.use_backend('torch'):
        with ops.use_backend(ops.available_backends()[0]):
            pass
        assert dispatch.choose(torch.ones(1)) == 'torch'
        inside = scan()
    torch.testing.assert_close(scan(), inside)


@pytest.mark.parametrize('name', ['native', 'triton'])
def test_use_backend_says_what_would_make_a_missing_one_usable(monkeypatch, name):
    monkeypatch.setitem(dispatch.MISSING, name, 'it is not here; run "make it"')
    assert name not in ops.available_backends()
    message = f'use_backend asks for the backend \'{name}\', which cannot run here: it is not here; run "make it"'
    with pytest.raises(ValueError, match=message), ops.use_backend(name):
        pass


def test_native_without_a_library_says_how_to_compile_it(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, '__file__', str(tmp_path / 'dispatch.py'))
    assert 'not compiled; reinstall mmspatialmamba with MMSPATIALMAMBA_WITH_OPS=1' in dispatch._load_native()


def test_native_with_a_broken_library_says_why_it_does_not_load(monkeypatch, tmp_path):
    (tmp_path / '_native.so').write_bytes(b'no library')
    monkeypatch.setattr(dispatch, '__file__', str(tmp_path / 'dispatch.py'))
    reason = dispatch._load_native()
    assert f'do not load with torch {torch.__version__}' in reason
    assert '_native.so' in reason
    assert reason.endswith('reinstall mmspatialmamba to compile them')
    assert '\n' not in reason


@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
def test_native_of_another_version_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(dispatch, '_NATIVE_OPS', ('state_fusion', 'chunked_scan'))
    assert dispatch._load_native() == (
        'its ops were compiled from another version, without chunked_scan, chunked_scan_backward; '
        'reinstall mmspatialmamba'
    )


def test_triton_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(dispatch, 'find_spec', lambda name: None)
    assert dispatch._find_triton() == 'triton is not installed; run "pip install triton"'


def test_reasons_of_devices(monkeypatch):
    monkeypatch.setattr(dispatch, 'MISSING', dict.fromkeys(('native', 'triton', 'torch')))
    monkeypatch.setattr(dispatch, '_NATIVE_DEVICES', frozenset({'cpu'}))
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert why_unusable('native', 'cpu') is None
    assert 'compiled without CUDA; reinstall mmspatialmamba with CUDA_HOME set' in why_unusable('native', 'cuda')
    assert why_unusable('native', 'mps') == 'it has no kernels for mps tensors'
    assert 'no kernels for cpu tensors, except in its interpreter, with TRITON_INTERPRET=1' in why_unusable(
        'triton', 'cpu'
    )
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert why_unusable('triton', 'cpu') is None
    assert why_unusable('torch', 'mps', torch.float64) is None


@pytest.mark.usefixtures('with_native')
def test_float64_is_refused_by_a_backend_asked_for_by_name():
    message = "use_backend asks for the backend 'native', which cannot run here: it computes in float32; convert the"
    with ops.use_backend('native'), pytest.raises(ValueError, match=message):
        scan(torch.float64)


@pytest.mark.usefixtures('with_native')
def test_float64_is_the_torch_backends_when_nobody_asks():
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert dispatch.choose(single) == 'native'
    assert dispatch.choose(single, double) == 'torch'
    assert scan(torch.float64).dtype == torch.float64


def test_environment_variable_chooses(monkeypatch):
    monkeypatch.setenv('MMSPATIALMAMBA_BACKEND', 'torch')
    assert dispatch.choose(torch.ones(1)) == 'torch'


def test_use_backend_goes_before_the_environment_variable(monkeypatch):
    monkeypatch.setenv('MMSPATIALMAMBA_BACKEND', 'cudnn')
    with ops.use_backend('torch'):
        scan()


def test_environment_variable_of_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv('MMSPATIALMAMBA_BACKEND', 'cudnn')
    message = "the environment variable MMSPATIALMAMBA_BACKEND asks for the backend 'cudnn': it must be one of native, "
    with pytest.raises(ValueError, match=message):
        scan()


def test_automatic_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    chosen = next(name for name in ops.available_backends() if why_unusable(name, 'cpu') is None)
    with caplog.at_level('INFO', logger='mmspatialmamba'):
        with ops.use_backend('torch'):
            scan()
        assert caplog.messages == []
        scan()
        scan()
    assert caplog.messages == [f"ops on cpu tensors run on the '{chosen}' backend"]


@pytest.mark.skipif(TORCH < (2, 9), reason='one graph needs PyTorch 2.9')
@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
def test_compiled_code_heeds_use_backend(monkeypatch):
    monkeypatch.setattr(dispatch, '_PREFERENCE', ('torch', 'native'))
    monkeypatch.delenv('MMSPATIALMAMBA_BACKEND', raising=False)
    graphs = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if 'mmspatialmamba' in str(node.target)])
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=record)
    def compiled(x):
        return ops.selective_scan(x, x, -x[0, :, :1], x[:, :1])

    x = torch.ones(2, 3, 5)
    compiled(x)
    with ops.use_backend('native'):
        compiled(x)
        compiled(x)
    compiled(x)
    assert graphs == [['mmspatialmamba_torch.selective_scan'], ['mmspatialmamba_native.selective_scan']]


def test_an_op_is_a_function_beside_the_folder_of_its_name():
    from mmspatialmamba.ops.state_fusion import reference
    from mmspatialmamba.ops.state_fusion.taps import TAPS

    assert len(TAPS) == 25
    assert ops.state_fusion is not sys.modules['mmspatialmamba.ops.state_fusion']
    assert reference.state_fusion is not ops.state_fusion


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
    result = subprocess.run([sys.executable, '-c', code + SCAN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif('native' not in ops.available_backends(), reason='needs the compiled ops')
@pytest.mark.parametrize('capability, expected', [('avx512', 'avx512'), ('avx2', 'avx2'), ('default', 'baseline')])
def test_native_runs_on_the_instruction_set_that_torch_chose(capability, expected):
    if platform.machine().lower() not in ('x86_64', 'amd64'):
        expected = 'baseline'
    elif expected.upper() not in torch.backends.cpu.get_cpu_capability() and expected == 'avx512':
        pytest.skip('needs a CPU with AVX-512')
    code = 'import torch; from mmspatialmamba import ops; print(torch.ops.mmspatialmamba_native.instruction_set())'
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == expected, result.stderr
