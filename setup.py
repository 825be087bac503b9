"""Compile the ops where that is possible, and put configs and tools into ``mmspatialmamba/.mim``.

pyproject.toml has the metadata, docs/install.md the environment variables that steer the compilation.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, errors, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / 'mmspatialmamba'
WITH_OPS = os.environ.get('MMSPATIALMAMBA_WITH_OPS')
FORCE_CUDA = os.environ.get('FORCE_CUDA') == '1'
CUDA_ARCHITECTURES = '8.0;9.0+PTX'
# The CPU kernels are compiled once for each, with these options.
INSTRUCTION_SETS = {'baseline': []}
if platform.machine().lower() in ('x86_64', 'amd64'):
    INSTRUCTION_SETS['avx2'] = ['-mavx2', '-mfma']
    INSTRUCTION_SETS['avx512'] = ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma']


def say(message: str) -> None:
    """Print a line about the compilation."""
    print(f'mmspatialmamba: {message}', file=sys.stderr, flush=True)


def find_cuda_home() -> Path | None:
    """Find the CUDA toolkit: ``CUDA_HOME``, ``CUDA_PATH``, the usual folder, or where nvcc is."""
    nvcc = shutil.which('nvcc')
    named = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda']
    for home in [*named, Path(nvcc).resolve().parents[1] if nvcc else None]:
        if home and Path(home, 'bin', 'nvcc').is_file() and Path(home, 'include', 'cuda_runtime.h').is_file():
            return Path(home)
    return None


CUDA_HOME = find_cuda_home()
if CUDA_HOME:
    os.environ['CUDA_HOME'] = str(CUDA_HOME)

if WITH_OPS != '0':
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        if WITH_OPS == '1':
            raise SystemExit(
                f'MMSPATIALMAMBA_WITH_OPS=1 needs torch while building ({error}): install torch first, then this '
                'package with pip install --no-build-isolation'
            ) from error
        say('torch is not there while building (pip install --no-build-isolation shows it): the ops are not compiled')
        WITH_OPS = '0'

if WITH_OPS is None and not any(
    shutil.which(command.split()[0]) for command in filter(None, [os.environ.get('CXX', 'c++'), 'g++'])
):
    say('there is no C++ compiler (c++ or g++, or what CXX names): the ops are not compiled')
    WITH_OPS = '0'


def mim_sources() -> list[Path]:
    """List what OpenMMLab's tools look for in ``.mim``.

    Returns:
        list[Path]: The ``configs`` and ``tools`` folders, and ``model-index.yml``.
    """
    return [ROOT / 'configs', ROOT / 'tools', ROOT / 'model-index.yml']


class BuildPy(build_py):
    """Copies ``.mim`` into a build, or links it into the checkout of an editable install."""

    def run(self):
        super().run()
        if self.editable_mode:
            self.link_mim()
        else:
            self.copy_mim(Path(self.build_lib) / 'mmspatialmamba' / '.mim')

    @staticmethod
    def link_mim():
        mim = PACKAGE / '.mim'
        if mim.exists():
            shutil.rmtree(mim)
        mim.mkdir()
        for source in mim_sources():
            (mim / source.name).symlink_to(os.path.relpath(source, mim))

    @staticmethod
    def copy_mim(mim):
        if mim.exists():
            shutil.rmtree(mim)
        mim.mkdir(parents=True)
        for source in mim_sources():
            if source.is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '*.py[co]')
                shutil.copytree(source, mim / source.name, ignore=ignore)
            else:
                shutil.copy2(source, mim / source.name)


def wants_cuda() -> bool:
    """Tell whether CUDA kernels are to be compiled: for a CUDA torch with a toolkit at hand, or ``FORCE_CUDA=1``."""
    if FORCE_CUDA:
        reason = None
        if CUDA_HOME is None:
            reason = 'a CUDA toolkit: install one and set CUDA_HOME'
        elif torch.version.cuda is None:
            reason = f'a torch with CUDA, but torch {torch.__version__} has none'
        if reason:
            raise SystemExit(f'FORCE_CUDA=1 needs {reason}')
        return True
    return CUDA_HOME is not None and torch.version.cuda is not None


def sources(name: str) -> list[str]:
    """List the files of a name in the ops' folders, relative to the checkout."""
    return sorted(f'csrc/{path.parent.name}/{name}' for path in ROOT.glob(f'csrc/*/{name}'))


def native_extension(with_cuda: bool) -> Extension:
    """Describe the library of compiled ops, but for the CPU kernels, which are compiled once per instruction set.

    Args:
        with_cuda (bool): Whether it has CUDA kernels.

    Returns:
        Extension: For ``BuildExtension``.
    """
    files = ['csrc/extension.cpp', *sources('bind.cpp')]
    libraries = ['c10', 'torch', 'torch_cpu']
    macros = [('WITH_AVX', None)] if 'avx512' in INSTRUCTION_SETS else []
    if with_cuda:
        files += sources('cuda.cu')
        libraries += ['c10_cuda', 'torch_cuda', 'cudart']
        macros.append(('WITH_CUDA', None))
    device = 'cuda' if with_cuda else 'cpu'
    # Where pip installed CUDA's libraries, their headers stand beside torch, and may be missing in the toolkit.
    wheels = [str(path) for path in sorted(Path(torch.__file__).parents[1].glob('nvidia/cu*/include'))]
    return Extension(
        'mmspatialmamba.ops._native',
        files,
        include_dirs=[str(ROOT / 'csrc'), *include_paths(device), *(wheels if with_cuda else [])],
        library_dirs=library_paths(device),
        libraries=libraries,
        define_macros=macros,
        # Compiled for OpenMP, but not linked to a runtime of its own: the one that torch loaded has the threads.
        extra_compile_args={'cxx': ['-O2', '-g0', '-fopenmp'], 'nvcc': ['-O3']},
        language='c++',
    )


if WITH_OPS != '0':

    class BuildNative(BuildExtension):
        """Compiles the ops, with CUDA kernels or else without, or says why it could not."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, 'no_python_abi_suffix': True})

        def build_extensions(self):
            os.environ.setdefault('TORCH_CUDA_ARCH_LIST', CUDA_ARCHITECTURES)
            (extension,) = self.extensions
            attempts = [True] if FORCE_CUDA else [True, False] if wants_cuda() else [False]
            objects = []
            for with_cuda in attempts:
                what = 'the ops for CPU and CUDA' if with_cuda else 'the ops for the CPU'
                say(f'compiling {what}')
                try:
                    # Once, and first: what follows changes how the compiler is called.
                    objects = objects or self.compile_cpu_kernels()
                    vars(extension).update(vars(native_extension(with_cuda)))
                    extension.extra_objects = objects
                    super().build_extensions()
                    return
                except (OSError, RuntimeError, errors.BaseError, errors.CompileError, errors.LinkError) as error:
                    last = with_cuda is attempts[-1]
                    if last and (WITH_OPS == '1' or FORCE_CUDA):
                        raise
                    consequence = 'they run on plain PyTorch' if last else 'now without CUDA'
                    say(f'{what} could not be compiled ({" ".join(str(error).split())[-300:]}): {consequence}')
            self.extensions.clear()

        def compile_cpu_kernels(self):
            """Compile the CPU kernels once for each instruction set.

            Returns:
                list[str]: The object files.
            """

            def compile_for(name):
                return self.compiler.compile(
                    sources('cpu.cpp'),
                    output_dir=str(Path(self.build_temp, name)),
                    macros=[('ISA', name)],
                    include_dirs=[str(ROOT / 'csrc')],
                    depends=[str(path) for path in ROOT.glob('csrc/**/*.h')],
                    extra_postargs=['-std=c++17', '-O3', '-g0', '-Wno-uninitialized', *INSTRUCTION_SETS[name]],
                )

            jobs = int(os.environ.get('MAX_JOBS') or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                return [path for paths in pool.map(compile_for, INSTRUCTION_SETS) for path in paths]


class EditableWheel(editable_wheel):
    """Lets ``mmengine.utils.get_installed_path`` find the package of an editable install.

    That function joins the folder which holds the distribution's metadata, here site-packages, with
    the first line of ``top_level.txt``. An absolute path there wins the join, so ``.mim`` is found.
    """

    def run(self):
        if self.dist_info_dir is None:
            dist_info = self.reinitialize_command('dist_info', output_dir=self.dist_dir)
            self.run_command('dist_info')
            self.dist_info_dir = dist_info.dist_info_dir
        top_level = Path(self.dist_info_dir, 'top_level.txt')
        top_level.write_text(f'{PACKAGE}\nmmspatialmamba\n', encoding='utf-8')
        super().run()


setup(
    ext_modules=[] if WITH_OPS == '0' else [native_extension(wants_cuda())],
    cmdclass={
        'build_py': BuildPy,
        'editable_wheel': EditableWheel,
        **({} if WITH_OPS == '0' else {'build_ext': BuildNative}),
    },
)
