"""The CUDA kernels' arithmetic and synchronisation, without a GPU: the same sources, compiled for the CPU."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from test_ops.truth import dilated_convolutions, relative_error, sequential_scan

EMULATOR = Path(__file__).parent / 'emulator'
SOURCES = Path(__file__).parents[3] / 'csrc'
HEADERS = ('cuda_runtime.h', 'cuda_runtime_api.h', 'cuda_fp16.h', 'cuda_bf16.h', 'cuda_pipeline.h')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IDS = ['float32', 'float16', 'bfloat16']
pytestmark = pytest.mark.slow
FLOAT32_FIRST = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]
FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
# Float32 arithmetic; a gradient in half precision is rounded once.
BOUNDS = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


class Map(Structure):
    _fields_ = [('data', c_void_p), ('dtype', c_int32)]
    _fields_ += [(name, c_int64) for name in ('batch', 'channel', 'row', 'column')]


class Plan(Structure):
    _fields_ = [(name, c_int32) for name in ('tile', 'tiles', 'rows', 'chunks')]


class Size(Structure):
    _fields_ = [(name, c_int32) for name in ('batch', 'dim', 'height', 'width')]


class ScanInputs(Structure):
    _fields_ = [(name, c_void_p) for name in ('A', 'B', 'C', 'D', 'bias')]
    _fields_ += [('size', Size), ('softplus', c_int32), ('u', Map), ('delta', Map), ('taps', c_void_p)]


class ScanGradients(Structure):
    _fields_ = [('u', Map), ('delta', Map), *((name, c_void_p) for name in ('B', 'C', 'parameters'))]


class SelectiveInputs(Structure):
    _fields_ = [(name, c_int32) for name in ('batch', 'dim', 'state', 'chunks')]
    _fields_ += [('length', c_int64), ('dtype', c_int32), ('softplus', c_int32)]
    _fields_ += [(name, c_void_p) for name in ('u', 'delta', 'A', 'B', 'bias')]


class SelectiveGradients(Structure):
    _fields_ = [(name, c_void_p) for name in ('u', 'delta', 'B', 'parameters')]


def build(folder: Path) -> Path:
    """Compile the kernels into a library in ``folder``."""
    for header in HEADERS:
        (folder / header).write_text('#include "emulator.h"\n')
    command = [
        'g++',
        '-std=c++20',
        '-O1',
        '-march=native',
        '-fPIC',
        '-Wall',
        '-Wextra',
        '-Werror',
        '-Wno-unknown-pragmas',
    ]
    command += [f'-I{path}' for path in (folder, EMULATOR, SOURCES)] + ['-x', 'c++', '-c']
    sources = [*sorted(SOURCES.glob('*/cuda.cu')), EMULATOR / 'bindings.cpp']
    objects = [folder / f'{source.parent.name}.o' for source in sources]

    def compile_one(source, target):
        return subprocess.run([*command, source, '-o', target], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compile_one, sources, objects):
            assert result.returncode == 0, result.stderr
    library = folder / 'kernels.so'
    subprocess.run(['g++', '-shared', *objects, '-o', library], check=True)
    return library


@pytest.fixture(scope='module')
def kernels():
    if shutil.which('g++') is None:
        pytest.skip('needs g++, to compile the CUDA kernels for the CPU')
    sources = sorted([*SOURCES.glob('*/*.cu*'), *SOURCES.glob('*/*.h'), *EMULATOR.iterdir()])
    digest = hashlib.sha256(b''.join(path.read_bytes() for path in [Path(__file__), *sources])).hexdigest()[:16]
    cached = Path(tempfile.gettempdir()) / f'mmspatialmamba-emulated-kernels-{digest}'
    if not cached.exists():
        with tempfile.TemporaryDirectory(prefix=f'{cached.name}-') as folder:
            library = build(Path(folder))
            cached.mkdir(exist_ok=True)
            library.rename(cached / library.name)
    library = ctypes.CDLL(str(cached / 'kernels.so'))
    for name in ('plan_blocks', 'scan_workspace', 'scan_backward_workspace'):
        getattr(library, f'emulated_{name}').restype = c_int64
    for name in ('selective_workspace', 'selective_backward_workspace'):
        getattr(library, f'emulated_{name}').restype = c_int64
    return library


def pointer(tensor):
    return None if tensor is None else c_void_p(tensor.data_ptr())


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def as_map(tensor):
    return Map(tensor.data_ptr(), DTYPES.index(tensor.dtype), *tensor.stride())


def nan(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=memory_format)


def nan_like(tensor):
    return torch.full_like(tensor, torch.nan)


def padded(dim):
    return -(-dim // 8) * 8


def make_plan(library, size, multiprocessors, max_tile):
    plan = Plan()
    library.emulated_plan(byref(size), multiprocessors, max_tile, byref(plan))
    return plan


def make_inputs(batch, dim, height, width, dtype, memory_format):
    generator = torch.Generator().manual_seed(height * 100 + width)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    u, delta, grad = (
        randn(batch, dim, height, width).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    parameters = {'A': -randn(dim).exp(), 'B': randn(batch, height * width), 'C': randn(batch, height * width)}
    parameters |= {'D': randn(dim), 'taps': randn(25, dim), 'bias': randn(dim)}
    return u, delta, grad, parameters


def fuse(h, taps):
    """The fusion by its 25 taps, through the three kernels that it is defined by."""
    k1 = taps[:9].t().reshape(-1, 1, 3, 3)
    others = [torch.cat([t[:4], torch.zeros_like(t[:1]), t[4:]]) for t in (taps[9:17], taps[17:])]
    return dilated_convolutions(h, [k1, *(t.t().reshape(-1, 1, 3, 3) for t in others)], torch.ones(3).double())


def true_scan(u, delta, p, bias, softplus):
    B, C = (p[name].unflatten(1, u.shape[2:]).unsqueeze(1) for name in 'BC')
    h = sequential_scan(u.flatten(2), delta.flatten(2), p['A'].unsqueeze(1), B.flatten(2), bias, softplus)
    return C * fuse(h[:, :, 0].view(u.shape), p['taps']) + p['D'].view(-1, 1, 1) * u


def run_scan(library, u, delta, grad, parameters, bias, softplus, multiprocessors, max_tile):
    """Output and gradients by the kernels."""
    batch, dim, height, width = u.shape
    size = Size(batch, dim, height, width)
    plan = make_plan(library, size, multiprocessors, max_tile)
    small = [address(parameters[name]) for name in 'ABCD']
    maps = as_map(u), as_map(delta)
    inputs = ScanInputs(*small, address(bias), size, softplus, *maps, address(parameters['taps']))
    y, grad_u, grad_delta = nan_like(u), nan_like(u), nan_like(delta)
    workspace = nan(library.emulated_scan_workspace(byref(size), byref(plan)))
    library.emulated_structure_aware_scan(byref(inputs), byref(plan), byref(as_map(y)), pointer(workspace))
    groups = padded(dim) // 8
    grad_B, grad_C = (nan(groups, batch, height * width) for _ in range(2))
    sums = nan(library.emulated_plan_blocks(byref(size), byref(plan)), 28, padded(dim))
    out = ScanGradients(as_map(grad_u), as_map(grad_delta), address(grad_B), address(grad_C), address(sums))
    workspace = nan(library.emulated_scan_backward_workspace(byref(size), byref(plan)))
    library.emulated_structure_aware_scan_backward(
        byref(inputs), byref(plan), byref(as_map(grad)), byref(out), pointer(workspace)
    )
    sums = sums.sum(0)[:, :dim]
    gradients = {'u': grad_u, 'delta': grad_delta, 'B': grad_B.sum(0), 'C': grad_C.sum(0)}
    return y, gradients | {'taps': sums[:25], 'A': sums[25], 'D': sums[26], 'bias': sums[27]}, plan


def check_scan(library, shape, dtype, memory_format, multiprocessors, max_tile, bias=True, softplus=True):
    u, delta, grad, parameters = make_inputs(*shape, dtype, memory_format)
    if not softplus:
        delta = delta.abs()
    values = parameters.pop('bias')
    bias = values if bias else None
    y, gradients, plan = run_scan(library, u, delta, grad, parameters, bias, softplus, multiprocessors, max_tile)
    names = ['u', 'delta', *parameters] + ['bias'] * (bias is not None)
    leaves = [t.double().requires_grad_() for t in (u, delta, *parameters.values(), bias) if t is not None]
    leaves = dict(zip(names, leaves))
    true = true_scan(leaves['u'], leaves['delta'], leaves, leaves.get('bias'), softplus)
    true.backward(grad.double())
    assert relative_error(y, true) < BOUNDS[dtype]
    for name, leaf in leaves.items():
        bound = BOUNDS[dtype if name in ('u', 'delta') else torch.float32]
        assert relative_error(gradients[name], leaf.grad) < bound, name
    return plan


SHAPES = [(1, 1), (1, 40), (40, 1), (6, 5), (17, 23)]


@pytest.mark.parametrize('height, width', SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize('dtype', FLOAT32_FIRST, ids=IDS)
@pytest.mark.parametrize('multiprocessors', [1, 1000], ids=['whole', 'chunks'])
def test_structure_aware_scan(kernels, height, width, memory_format, dtype, multiprocessors):
    plan = check_scan(kernels, (2, 11, height, width), dtype, memory_format, multiprocessors, 128)
    assert plan.tiles == 1
    assert plan.chunks == (1 if multiprocessors == 1 else -(-height // 8))


# 16 channels and 24 columns let every access be a vector's.
@pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize('dtype', DTYPES, ids=IDS)
@pytest.mark.parametrize('max_tile, tiles', [(128, 1), (16, 2), (8, 3)], ids=['whole', 'two', 'three'])
def test_structure_aware_scan_vectorised_and_tiled(kernels, memory_format, dtype, max_tile, tiles):
    plan = check_scan(kernels, (1, 16, 19, 24), dtype, memory_format, 1, max_tile)
    assert plan.tiles == tiles


@pytest.mark.parametrize('width, max_tile, tiles', [(27, 8, 4), (33, 16, 3), (17, 16, 2), (9, 8, 2), (130, 128, 2)])
@pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)
def test_structure_aware_scan_in_ragged_tiles(kernels, width, max_tile, tiles, memory_format):
    plan = check_scan(kernels, (1, 3, 12, width), torch.float32, memory_format, 1000, max_tile)
    assert (plan.tiles, plan.chunks) == (tiles, 2)


@pytest.mark.parametrize('bias', [False, True], ids=['no_bias', 'bias'])
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_structure_aware_scan_options(kernels, bias, softplus):
    check_scan(kernels, (2, 3, 7, 9), torch.float32, torch.channels_last, 1000, 128, bias, softplus)


@pytest.mark.slow
@pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize('height, width', [(2, 1100), (64, 56), (400, 2)], ids=str)
def test_structure_aware_scan_on_large_maps(kernels, height, width, memory_format):
    check_scan(kernels, (1, 9, height, width), torch.float32, memory_format, 132, 128)


def test_views_with_strides(kernels):
    """Inputs may be slices of larger arrays, each in its own memory format."""
    u, delta, grad, parameters = make_inputs(2, 8, 6, 8, torch.float32, torch.channels_last)
    bias = parameters.pop('bias')
    expected, expected_gradients, _ = run_scan(kernels, u, delta, grad, parameters, bias, True, 1, 128)
    sliced = torch.cat([nan_like(u), u], 1).contiguous(memory_format=torch.channels_last)[:, 8:]
    rows = torch.cat([delta.contiguous(), nan_like(delta)], 3)[..., :8]
    y, gradients, _ = run_scan(kernels, sliced, rows, grad, parameters, bias, True, 1, 128)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)


def test_nan_stays_in_its_channel(kernels):
    u, delta, grad, parameters = make_inputs(1, 9, 7, 9, torch.float32, torch.channels_last)
    u[0, 4, 2, 3] = torch.nan
    y, gradients, _ = run_scan(kernels, u, delta, grad, parameters, None, True, 1000, 128)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert y[:, 4].isnan().any()
    for name in ('u', 'delta'):
        assert gradients[name][:, others].isfinite().all(), name
    assert y[:, others].isfinite().all()
    assert gradients['taps'][:, others].isfinite().all()


@pytest.mark.parametrize('shift', [-100, -20, 0, 100])
@pytest.mark.parametrize('A', [-1e-6, -1.0, -1e4])
def test_extreme_steps_and_decays(kernels, shift, A):
    u, delta, grad, parameters = make_inputs(1, 8, 5, 6, torch.float32, torch.channels_last)
    delta = (delta + shift).clamp(-100, 100)
    parameters['A'] = torch.full((8,), A)
    y, gradients, _ = run_scan(kernels, u, delta, grad, parameters, None, True, 1, 128)
    leaves = {'u': u, 'delta': delta} | parameters
    leaves = {name: t.double().requires_grad_() for name, t in leaves.items()}
    true = true_scan(leaves['u'], leaves['delta'], leaves, None, True)
    true.backward(grad.double())
    assert relative_error(y, true) < 5e-6
    for name in ('u', 'delta'):
        assert gradients[name].isfinite().all()
        # Below float32's range is 0.
        assert relative_error(gradients[name], leaves[name].grad) < 2e-5 or leaves[name].grad.abs().max() < 1e-36, name


@pytest.mark.parametrize('height, width, max_tile', [*((*shape, 128) for shape in SHAPES), (12, 27, 8)], ids=str)
@pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS)
def test_state_fusion(kernels, height, width, max_tile, memory_format):
    h, _, grad, parameters = make_inputs(2, 11, height, width, torch.float32, memory_format)
    taps = parameters['taps']
    size = Size(*h.shape)
    plan = make_plan(kernels, size, 1000, max_tile)
    out, grad_h = nan_like(h), nan_like(h)
    sums = nan(kernels.emulated_plan_blocks(byref(size), byref(plan)), 28, padded(11))
    kernels.emulated_state_fusion(byref(size), byref(plan), byref(as_map(h)), pointer(taps), byref(as_map(out)))
    kernels.emulated_state_fusion_backward(
        *(byref(x) for x in (size, plan, as_map(grad), as_map(h))), pointer(taps), byref(as_map(grad_h)), pointer(sums)
    )
    leaves = [t.double().requires_grad_() for t in (h, taps)]
    true = fuse(*leaves)
    true.backward(grad.double())
    assert relative_error(out, true) < 2e-6
    assert relative_error(grad_h, leaves[0].grad) < 2e-6
    assert relative_error(sums.sum(0)[:25, :11], leaves[1].grad) < 2e-6


@pytest.mark.parametrize('state', [1, 3])
@pytest.mark.parametrize('length, chunks', [(1, 1), (40, 1), (300, 1), (40, 4), (600, 2)], ids=str)
@pytest.mark.parametrize('dtype', FLOAT32_FIRST, ids=IDS)
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus_and_bias'])
def test_selective_scan(kernels, state, length, chunks, dtype, softplus):
    generator = torch.Generator().manual_seed(length)
    batch, dim = 2, 3
    u, delta = (torch.randn(batch, dim, length, generator=generator).to(dtype) for _ in range(2))
    A, B = -torch.rand(dim, state, generator=generator), torch.randn(batch, state, length, generator=generator)
    bias = torch.randn(dim, generator=generator) if softplus else None
    if not softplus:
        delta = delta.abs()
    h = nan(batch, dim, state, length)
    grad = torch.randn(h.shape, generator=generator)
    inputs = SelectiveInputs(
        *(batch, dim, state, chunks, length, DTYPES.index(dtype), softplus), *map(address, (u, delta, A, B, bias))
    )
    workspace = nan(kernels.emulated_selective_workspace(byref(inputs)))
    kernels.emulated_selective_scan(byref(inputs), pointer(h), pointer(workspace))
    grads = [nan_like(u), nan_like(delta), nan_like(B), nan(batch * chunks, dim, state + 1)]
    workspace = nan(kernels.emulated_selective_backward_workspace(byref(inputs)))
    out = SelectiveGradients(*map(address, grads))
    kernels.emulated_selective_scan_backward(byref(inputs), pointer(grad), pointer(h), byref(out), pointer(workspace))
    leaves = [t.double().requires_grad_() for t in (u, delta, A, B, bias) if t is not None]
    true = sequential_scan(*leaves, delta_softplus=softplus)
    true.backward(grad.double())
    assert relative_error(h, true) < 2e-6
    sums = grads.pop().sum(0)
    for name, value, leaf in zip(
        ('u', 'delta', 'B', 'A'), (*grads, sums[:, :state]), (*leaves[:2], leaves[3], leaves[2])
    ):
        assert relative_error(value, leaf.grad) < BOUNDS[dtype if name in ('u', 'delta') else torch.float32], name
    if bias is not None:
        assert relative_error(sums[:, state], leaves[4].grad) < 5e-6
