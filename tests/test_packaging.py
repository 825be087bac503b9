from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
INSTALLED_PATH = """
import warnings
warnings.simplefilter('ignore')
import importlib.util, os
from mmengine.utils import get_installed_path
path = get_installed_path('mmspatialmamba')
origin = importlib.util.find_spec('mmspatialmamba').origin
assert os.path.realpath(path) == os.path.dirname(os.path.realpath(origin)), (path, origin)
print(path)
"""


def run(*command, cwd, **variables):
    environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shipped():
    """List what has to be in ``.mim``, relative to it."""
    paths = [path for name in ('configs', 'tools') for path in (REPO / name).rglob('*')]
    files = [path for path in paths if path.is_file() and '__pycache__' not in path.parts]
    files.append(REPO / 'model-index.yml')
    return sorted(path.relative_to(REPO).as_posix() for path in files)


def build_wheel(source, folder):
    """Build a wheel where there is no compiler."""
    empty = folder / 'empty'
    empty.mkdir(parents=True)
    pip = ('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder)
    run(sys.executable, *pip, source, cwd=folder, PATH=empty, CC='false', CXX='false')
    (wheel,) = folder.glob('mmspatialmamba-*-py3-none-any.whl')
    return wheel


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of what packaging reads, so that building leaves this checkout alone."""
    root = tmp_path_factory.mktemp('packaging') / 'checkout'
    ignored = shutil.ignore_patterns('__pycache__', '.mim')
    for name in ('mmspatialmamba', 'configs', 'csrc', 'tools', 'requirements'):
        shutil.copytree(REPO / name, root / name, ignore=ignored)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'model-index.yml'):
        shutil.copy(REPO / name, root / name)
    return root


@pytest.fixture(scope='module')
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp('wheel'))


def test_wheel_holds_package_configs_and_tools(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    mim = 'mmspatialmamba/.mim/'
    assert sorted(n[len(mim) :] for n in names if n.startswith(mim)) == shipped()
    assert {f'mmspatialmamba/{name}' for name in ('__init__.py', 'py.typed', 'version.py')} <= set(names)
    tops = {name.split('/')[0] for name in names}
    assert len(tops) == 2, tops


def test_wheel_has_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = message_from_string(archive.read(name).decode())
    assert metadata['Name'] == 'mmspatialmamba'
    assert metadata['Version'] == runpy.run_path(str(REPO / 'mmspatialmamba' / 'version.py'))['__version__']
    assert 'License :: OSI Approved :: Apache Software License' in metadata.get_all('Classifier')
    assert metadata['License-File'] == 'LICENSE'
    assert metadata['Requires-Python'] == '>=3.9'
    assert metadata.get_payload() == (REPO / 'README.md').read_text(encoding='utf-8')
    requirements = metadata.get_all('Requires-Dist')
    assert 'numpy' in requirements
    for extra, file in {'openmmlab': 'openmmlab', 'demo': 'runtime', 'tests': 'tests'}.items():
        lines = (REPO / 'requirements' / f'{file}.txt').read_text(encoding='utf-8').splitlines()
        for line in lines:
            assert line.startswith('#') or f'{line}; extra == "{extra}"' in requirements


def test_unpacked_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    code = 'import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob('mmspatialmamba-*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    source = tmp_path / sdist.name[: -len('.tar.gz')]
    assert (source / 'LICENSE').read_text() == (REPO / 'LICENSE').read_text()
    assert (source / 'csrc' / 'extension.cpp').is_file()
    again = build_wheel(source, tmp_path / 'wheel')
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_mmengine_finds_an_installed_wheel(wheel, tmp_path):
    target = tmp_path / 'target'
    pip = ('-m', 'pip', 'install', '--no-deps', '--no-index', '--target', target, wheel)
    run(sys.executable, *pip, cwd=tmp_path)
    found = Path(run(sys.executable, '-c', INSTALLED_PATH, cwd=tmp_path, PYTHONPATH=target).strip())
    assert found == target / 'mmspatialmamba'
    assert sorted(p.name for p in (found / '.mim').iterdir()) == ['configs', 'model-index.yml', 'tools']


def test_mmengine_finds_an_editable_checkout_from_any_folder(checkout, tmp_path):
    venv.create(tmp_path / 'env', symlinks=True)
    (site_packages,) = (tmp_path / 'env').glob('lib/python*/site-packages')
    (site_packages / 'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    python = tmp_path / 'env' / 'bin' / 'python'
    pip = ('-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--no-index', '-e')
    run(python, *pip, checkout, cwd=tmp_path, MMSPATIALMAMBA_WITH_OPS=0)
    for folder in (tmp_path, checkout):
        found = Path(run(python, '-c', INSTALLED_PATH, cwd=folder).strip()).resolve()
        assert found == checkout / 'mmspatialmamba'
    config = checkout / 'configs' / 'new.py'
    config.write_text('a = 1\n')
    assert (found / '.mim' / 'configs' / 'new.py').read_text() == 'a = 1\n'
    config.unlink()


# What is compiled is an empty file, and each call a line of the log.
COMPILER = """#!/bin/sh
case " $* " in
  *" -v "*) echo COLLECT_GCC=g++; exit ;;
  *" --version "*) echo "release $CUDA"; exit ;;
  *" -dumpfullversion "*) echo 11.4.0; exit ;;
esac
echo "$0 $@" >> "$LOG"
for argument; do [ "$last" = -o ] && : > "$argument"; last=$argument; done
"""
# Knows no options, as ccache.
LAUNCHER = """#!/bin/sh
case "$1" in -*) exit 1 ;; esac
exec "$@"
"""
SCRIPTS = {
    'compiler': COMPILER,
    'launcher': LAUNCHER,
    'speechless': '#!/bin/sh\ncase "$1" in -v|--version) exit 1 ;; esac\nexec compiler "$@"',
    'ninja/ninja': '#!/bin/sh\n[ "$1" = --version ] && echo 1.11 && exit\nexit 1',
    'torch/torch/__init__.py': 'raise OSError("no libcudart.so")',
    'cuda/bin/nvcc': COMPILER,
    'cuda/include/cuda_runtime.h': '',
    'broken/bin/nvcc': '#!/bin/sh\nexit 1',
    'broken/include/cuda_runtime.h': '',
}
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason='needs a torch with CUDA')


@pytest.fixture
def build(checkout, tmp_path):
    """Compile with compilers that write nothing; return the exit code, our lines, and what was called."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    library, log = checkout / 'mmspatialmamba' / 'ops' / '_native.so', tmp_path / 'log'
    log.touch()

    def build(**variables):
        path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
        variables = {'CXX': 'compiler', 'CUDA_HOME': '/nowhere', 'PATH': path, **variables}
        variables = {name: value.replace('HERE', str(tmp_path)) for name, value in variables.items()}
        environment = {**os.environ, 'LOG': str(log), 'CUDA': str(torch.version.cuda), **variables}
        library.unlink(missing_ok=True)
        command = (sys.executable, 'setup.py', 'build_ext', '--inplace', '--build-temp', tmp_path / 'build')
        result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert 'Traceback' not in result.stderr, result.stderr
        assert library.exists() == (result.returncode == 0 and 'the ops are not compiled' not in result.stderr)
        lines = [line for line in result.stderr.splitlines() if line.startswith('mmspatialmamba: ')]
        return result.returncode, lines, log.read_text().splitlines()

    yield build
    library.unlink(missing_ok=True)


@needs_cuda_torch
def test_compilers_with_arguments(build, tmp_path):
    code, lines, calls = build(CXX='launcher compiler -DX="a b"', CC='launcher compiler', CUDA_HOME='HERE/cuda')
    assert code == 0
    assert lines == ['mmspatialmamba: compiling the CPU kernels', 'mmspatialmamba: compiling the CUDA kernels']
    of_nvcc = [line for line in calls if line.startswith(str(tmp_path / 'cuda'))]
    of_cxx = [line for line in calls if line.startswith(str(tmp_path / 'compiler'))]
    assert len(of_nvcc) == 3 and all(f'-ccbin {tmp_path}/build/cc ' in f'{line} ' for line in of_nvcc)
    assert len(of_cxx) > 3 and all('-DX=a b' in line for line in of_cxx)
    assert (tmp_path / 'build' / 'cc').read_text().endswith('exec launcher compiler "$@"\n')


@pytest.mark.parametrize(
    'variables, reason',
    [
        (dict(CXX='no-such -O2'), 'there is no no-such; they need torch'),
        (dict(CXX="'compiler"), 'No closing quotation; they need torch'),
        (dict(CXX='false'), "CompileError: command '.*/false' failed with exit code 1"),
        (dict(CXX='speechless'), r"CalledProcessError: Command '\['speechless', '--version'\]' returned non-zero"),
        (dict(CC='"gcc'), 'ValueError: '),
        (dict(PATH=f'HERE/ninja{os.pathsep}HERE{os.pathsep}/bin'), 'RuntimeError: Error compiling objects'),
        (dict(PYTHONPATH='HERE/torch'), 'no libcudart.so; they need torch'),
    ],
    ids=['no-compiler', 'CXX', 'compiler-fails', 'probing', 'CC', 'ninja', 'torch'],
)
def test_a_failed_step_is_left_out_unless_asked_for(build, variables, reason):
    code, lines, _ = build(**variables)
    assert code == 0
    assert re.match(f'mmspatialmamba: the ops are not compiled: {reason}', lines[-1]), lines
    code, asked, _ = build(**variables, MMSPATIALMAMBA_WITH_OPS='1')
    assert code == 1 and asked == lines


@pytest.mark.parametrize(
    'variables, reason',
    [
        ({}, 'there is no CUDA toolkit in /nowhere'),
        (dict(CUDA_HOME='HERE/broken'), 'CalledProcessError: .*nvcc'),
        (dict(CUDA_HOME='HERE/cuda', TORCH_CUDA_ARCH_LIST='many'), 'ValueError: Unknown CUDA arch'),
    ],
    ids=['no-toolkit', 'nvcc-fails', 'architectures'],
)
@needs_cuda_torch
def test_without_cuda_the_cpu_kernels_are_compiled_unless_cuda_is_asked_for(build, variables, reason):
    code, lines, _ = build(**variables, MMSPATIALMAMBA_WITH_OPS='1')
    reason = f'mmspatialmamba: the CUDA kernels are not compiled: {reason}'
    assert code == 0 and sum(re.match(reason, line) is not None for line in lines) == 1, lines
    code, lines, _ = build(**variables, FORCE_CUDA='1')
    assert code == 1 and re.match(reason, lines[-1]), lines
