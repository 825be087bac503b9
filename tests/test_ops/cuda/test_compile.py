"""The CUDA kernels compile for sm_90, without warnings and without spilling registers to local memory."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / 'csrc'
SPILLS = re.compile(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads')


def find_nvcc():
    home = os.environ.get('CUDA_HOME')
    places = [os.path.join(home, 'bin')] if home else []
    return shutil.which('nvcc', path=os.pathsep.join([*places, os.environ.get('PATH', ''), '/usr/local/cuda/bin']))


@pytest.mark.slow
@pytest.mark.parametrize('op', ['structure_aware_scan', 'selective_scan', 'state_fusion'])
def test_compiles_without_spills(op, tmp_path, record_property):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip('needs nvcc, in CUDA_HOME, on PATH or in /usr/local/cuda')
    command = [nvcc, '-std=c++17', '-O3', '-arch=sm_90', '-Xcompiler', '-Wall', '-Xptxas', '-v,-warn-spills']
    start = time.monotonic()
    result = subprocess.run(
        [*command, f'-I{SOURCES}', '-c', SOURCES / op / 'cuda.cu', '-o', tmp_path / f'{op}.o'],
        capture_output=True,
        text=True,
    )
    record_property('compile_seconds', round(time.monotonic() - start, 1))
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert 'warning' not in output.lower(), output
    kernels = SPILLS.findall(output)
    assert kernels, f'nvcc did not say what the kernels use:\n{output}'
    assert all(spill == ('0', '0', '0') for spill in kernels), output


def test_every_kernel_file_is_compiled():
    assert {path.parent.name for path in SOURCES.glob('**/*.cu')} == {
        'structure_aware_scan',
        'selective_scan',
        'state_fusion',
    }
