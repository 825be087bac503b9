from __future__ import annotations

import os
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
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['License-File'] == 'LICENSE'
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
