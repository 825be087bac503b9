"""Compile the ops where that is possible, and put configs and tools into ``mmspatialmamba/.mim``.

pyproject.toml has the metadata, docs/install.md the environment variables that steer the compilation.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split('.')[0]) < 64:
    raise SystemExit(f'mmspatialmamba: setuptools {setuptools.__version__} is too old: run "pip install -U setuptools"')
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / 'mmspatialmamba'
WITH_OPS = os.environ.get('MMSPATIALMAMBA_WITH_OPS')
FORCE_CUDA = os.environ.get('FORCE_CUDA') == '1'
ASKED_FOR = WITH_OPS == '1' or FORCE_CUDA
CUDA_ARCHITECTURES = '8.0;9.0+PTX'
# The CPU kernels are compiled once for each, with these options.
INSTRUCTION_SETS = {'baseline': []}
if platform.machine().lower() in ('x86_64', 'amd64'):
    INSTRUCTION_SETS['avx2'] = ['-mavx2', '-mfma']
    INSTRUCTION_SETS['avx512'] = ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma']


def say(message: str) -> None:
    """Print a line about the compilation."""
    print(f'mmspatialmamba: {message}', file=sys.stderr, flush=True)


def leave_out(what: str, reason: object, asked_for: bool) -> None:
    """Say why something is not compiled, and stop there if it was asked for by name."""
    if isinstance(reason, Exception):
        reason = f'{type(reason).__name__}: {reason}'
    message = f'{what} are not compiled: {textwrap.shorten(str(reason), 400)}'
    if asked_for:
        raise SystemExit(f'mmspatialmamba: {message}')
    say(message)


def cuda_homes() -> list[Path]:
    """List where the CUDA toolkit may be: what ``CUDA_HOME`` or ``CUDA_PATH`` names, else the usual folders."""
    named, nvcc = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH'), shutil.which('nvcc')
    if named:
        return [Path(named)]
    return [Path('/usr/local/cuda'), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]


def is_cuda_home(home: Path) -> bool:
    """Tell whether a folder holds a CUDA toolkit."""
    return (home / 'bin' / 'nvcc').is_file() and (home / 'include' / 'cuda_runtime.h').is_file()


CUDA_HOME = next(filter(is_cuda_home, cuda_homes()), None)
if CUDA_HOME:
    os.environ['CUDA_HOME'] = str(CUDA_HOME)
for variable in ('CC', 'CXX'):
    if not os.environ.get(variable):
        os.environ.pop(variable, None)

if WITH_OPS != '0':
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

        if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 1):
            raise SystemExit(f'mmspatialmamba: torch {torch.__version__} is too old: install PyTorch 2.1 or newer')
        compilers = shlex.split(os.environ['CXX'])[:1] if 'CXX' in os.environ else ['c++', 'g++']
        if not any(map(shutil.which, compilers)):
            raise FileNotFoundError(f'there is no {" or ".join(compilers)}')
    except Exception as error:  # a broken torch raises errors of many kinds
        needs = (
            'they need torch, which pip install --no-build-isolation shows them, and a C++ compiler, which CXX names'
        )
        leave_out('the ops', f'{error}; {needs}', ASKED_FOR)
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


def cuda_obstacle() -> str | None:
    """Return what is missing to compile CUDA kernels, or None."""
    if torch.version.cuda is None:
        return f'torch {torch.__version__} has no CUDA'
    if CUDA_HOME is None:
        return f'there is no CUDA toolkit in {" or ".join(map(str, cuda_homes()))}; CUDA_HOME names its folder'
    return None


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
    device = ['cuda'] if with_cuda else []
    # Where pip installed CUDA's libraries, their headers stand beside torch, and may be missing in the toolkit.
    wheels = [str(path) for path in sorted(Path(torch.__file__).parents[1].glob('nvidia/cu*/include'))]
    return Extension(
        'mmspatialmamba.ops._native',
        files,
        include_dirs=[str(ROOT / 'csrc'), *include_paths(*device), *(wheels if with_cuda else [])],
        library_dirs=library_paths(*device),
        libraries=libraries,
        define_macros=macros,
        # Compiled for OpenMP, but not linked to a runtime of its own: the one that torch loaded has the threads.
        extra_compile_args={'cxx': ['-O2', '-g0', '-fopenmp'], 'nvcc': ['-O3']},
        language='c++',
    )


if WITH_OPS != '0':

    class BuildNative(BuildExtension):
        """Compiles the ops, with CUDA kernels or else without, or says why it could not.

        The reasons are errors of many kinds: torch and setuptools raise assertions, warnings and failed commands too.
        """

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, 'no_python_abi_suffix': True})

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # what an earlier run left in build may be compiled for another torch

        def run(self):
            try:
                for variable in ('CC', 'CXX'):
                    self.join_words(variable)
                super().run()
            except Exception as error:
                leave_out('the ops', error, ASKED_FOR)
                self.extensions.clear()

        def join_words(self, variable):
            """Put a compiler with arguments into a script: torch and nvcc take what names it for one word."""
            words = shlex.split(os.environ.get(variable, ''))
            if len(words) > 1:
                script = Path(self.build_temp, variable.lower()).absolute()
                script.parent.mkdir(parents=True, exist_ok=True)
                script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
                script.chmod(0o755)
                os.environ.update({variable: str(script), 'TORCH_NO_COMPILER_WRAPPER': '1'})

        def build_extensions(self):
            obstacle = cuda_obstacle()
            if obstacle:
                leave_out('the CUDA kernels', obstacle, FORCE_CUDA)
            say('compiling the CPU kernels')
            # First: what follows changes how the compiler is called.
            objects = self.compile_cpu_kernels()
            if not obstacle:
                say('compiling the CUDA kernels')
                try:
                    return self.build_library(objects, with_cuda=True)
                except Exception as error:
                    leave_out('the CUDA kernels', error, FORCE_CUDA)
            self.build_library(objects, with_cuda=False)

        def build_library(self, objects, with_cuda):
            os.environ.setdefault('TORCH_CUDA_ARCH_LIST', CUDA_ARCHITECTURES)
            (extension,) = self.extensions
            vars(extension).update(vars(native_extension(with_cuda)))
            extension.extra_objects = objects
            super().build_extensions()

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
    ext_modules=[] if WITH_OPS == '0' else [native_extension(with_cuda=False)],
    cmdclass={
        'build_py': BuildPy,
        'editable_wheel': EditableWheel,
        **({} if WITH_OPS == '0' else {'build_ext': BuildNative}),
    },
)
