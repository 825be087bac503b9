import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    '_scan_kernel',
    '_reverse_scan_kernel',
    '_fusion_kernel',
    '_fold_kernel',
    '_fusion_backward_kernel',
}


@pytest.mark.slow
@pytest.mark.parametrize('memory_format, dtype', [('contiguous_format', 'float32'), ('channels_last', 'bfloat16')])
def test_every_kernel_compiles_and_stays_in_registers(memory_format, dtype, tmp_path, pytestconfig):
    pytest.importorskip('triton')
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    folders = (pytestconfig.rootpath, pytestconfig.rootpath / 'tests')
    environment |= {'TRITON_CACHE_DIR': str(tmp_path), 'PYTHONPATH': os.pathsep.join(map(str, folders))}
    command = [sys.executable, Path(__file__).with_name('compile_kernels.py'), memory_format, dtype]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    spilled = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, _ in spilled} == KERNELS
    # A few scalars may be kept in local memory across a loop, but no tile: one takes hundreds of bytes a thread.
    assert all(int(spill) <= 64 for _, spill in spilled), run.stdout
