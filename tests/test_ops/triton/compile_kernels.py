"""Compile every kernel for sm_90, without a GPU, and print for each its name and how many bytes a thread spills."""

import re
import subprocess
import sys
import tempfile

import torch
import triton
from test_ops.triton.cases import triton_ops
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launch = JITFunction.run


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.NamedTemporaryFile(suffix='.ptx') as source:
        source.write(kernel.asm['ptx'].encode())
        source.flush()
        command = [triton.knobs.nvidia.ptxas.path, '-v', '--gpu-name=sm_90a', source.name, '-o', '/dev/null']
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(self.__name__, sum(int(n) for n in re.findall(r'(\d+) bytes spill', report)))


def main(memory_format, dtype):
    JITFunction.run = compile_only
    driver.set_active(NoDevice())
    ops = triton_ops()
    dim, size = 64, (33, 30)
    u, b = (torch.zeros(1, n, *size, dtype=dtype).contiguous(memory_format=memory_format) for n in (dim, 1))
    kernels = [torch.zeros(dim, 1, 3, 3)] * 3
    A, D, alpha = torch.zeros(dim, 1), torch.zeros(dim), torch.zeros(3)
    inputs = (u, u, A, b, b, D, *kernels, alpha, D, True)
    ops.structure_aware_scan(*inputs)
    ops.structure_aware_scan_backward(u, *inputs)
    ops.state_fusion(u, *kernels, alpha)
    ops.state_fusion_backward(u, u, *kernels, alpha)
    u, b, A = u.flatten(2), b.flatten(2).expand(-1, 4, -1), A.expand(-1, 4)
    h = ops.selective_scan(u, u, A, b, None, False)
    ops.selective_scan_backward(h, h, u, u, A, b, None, False)


if __name__ == '__main__':
    main(getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2]))
