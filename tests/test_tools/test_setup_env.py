from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(sysconfig.get_path('purelib'))

spec = importlib.util.spec_from_file_location('setup_env', REPO / 'tools' / 'setup_env.py')
setup_env = importlib.util.module_from_spec(spec)
sys.modules['setup_env'] = setup_env
spec.loader.exec_module(setup_env)


def make_venv(root):
    """Make an environment that has nothing, not even pip, and return its site-packages."""
    venv.create(root, symlinks=True)
    return next(root.glob('lib/python*/site-packages'))


def borrowing_venv(root):
    """Make an environment that also sees all packages of the running one."""
    (make_venv(root) / 'borrowed.pth').write_text(f'{SITE_PACKAGES}\n')


def write_package(folder, name, code):
    (folder / name).mkdir(parents=True)
    (folder / name / '__init__.py').write_text(code)


def run_script(checkout, *arguments, python=sys.executable, **variables):
    dropped = ('MMSPATIALMAMBA_VENV', 'PYTHONPATH', 'VIRTUAL_ENV')
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment.update({key: str(value) for key, value in variables.items()})
    return subprocess.run(
        [python, checkout / 'tools' / 'setup_env.py', *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path):
    """What the script reads of a checkout, in a folder whose name has a space."""
    root = tmp_path / 'a checkout'
    for name in ('tools/setup_env.py', 'mmspatialmamba/version.py'):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(REPO / name, root / name)
    shutil.copytree(REPO / 'requirements', root / 'requirements')
    return root


class TestChoice:
    def printed(self, checkout, root, **variables):
        result = run_script(checkout, '--print-python', python=root / 'bin' / 'python', **variables)
        assert result.returncode == 0, result.stderr
        return Path(result.stdout.rstrip('\n'))

    def test_without_torch_it_is_the_checkouts_own_and_nothing_is_made(self, checkout, tmp_path):
        make_venv(tmp_path / 'active')
        chosen = self.printed(checkout, tmp_path / 'active')
        assert chosen == checkout / '.venv' / 'bin' / 'python'
        assert not (checkout / '.venv').exists()

    def test_without_torch_the_variable_names_the_folder(self, checkout, tmp_path):
        make_venv(tmp_path / 'active')
        chosen = self.printed(checkout, tmp_path / 'active', MMSPATIALMAMBA_VENV=tmp_path / 'elsewhere')
        assert chosen == tmp_path / 'elsewhere' / 'bin' / 'python'

    def test_with_torch_it_is_the_active_one(self, checkout, tmp_path):
        write_package(make_venv(tmp_path / 'active'), 'torch', '')
        chosen = self.printed(checkout, tmp_path / 'active', MMSPATIALMAMBA_VENV=tmp_path / 'elsewhere')
        assert chosen == tmp_path / 'active' / 'bin' / 'python'

    def test_pins_hold_in_the_own_one_but_only_of_openmmlab_in_others(self, tmp_path):
        own, other = (setup_env.Environment(tmp_path / 'python', tmp_path, own=own) for own in (True, False))
        assert any(row.startswith('numpy==') for row in own.requirements('runtime'))
        assert 'numpy' in other.requirements('runtime')
        assert 'setuptools>=77,<81' in other.requirements('build')
        assert own.requirements('openmmlab') == other.requirements('openmmlab')
        assert 'mmcv==2.1.0' in own.requirements('openmmlab')


class TestFailure:
    @pytest.mark.slow
    def test_shows_command_log_and_advice_and_the_next_run_goes_on(self, checkout, tmp_path):
        borrowing_venv(tmp_path / 'own')
        (tmp_path / 'empty').mkdir()
        variables = {
            'MMSPATIALMAMBA_VENV': tmp_path / 'own',
            'PIP_NO_INDEX': '1',
            'PIP_FIND_LINKS': tmp_path / 'empty',
        }
        bare = make_venv(tmp_path / 'bare').parents[2] / 'bin' / 'python'
        build, tests = (checkout / 'requirements' / f'{name}.txt' for name in ('build', 'tests'))
        pins = build.read_text()
        build.write_text(pins + 'mmspatialmamba-absent-a==1.0\n')
        with tests.open('a') as stream:
            stream.write('mmspatialmamba-absent-b==1.0\n')

        first = run_script(checkout, python=bare, **variables)
        assert first.returncode == 1
        log = checkout / 'build' / 'setup-logs' / 'build-tools.log'
        assert 'setup: build tools ...' in first.stdout
        assert f'{tmp_path}/own/bin/python -m pip install' in first.stderr
        assert '| ERROR: No matching distribution found for mmspatialmamba-absent-a' in first.stderr
        assert str(log) in first.stderr
        assert 'What to do: ' in first.stderr
        assert 'Traceback' not in first.stderr
        assert 'No matching distribution' in log.read_text()

        build.write_text(pins)
        second = run_script(checkout, python=bare, **variables)
        assert second.returncode == 1
        assert 'mmspatialmamba-absent-a' not in second.stdout + second.stderr
        assert 'packages ...' in second.stdout
        assert 'No matching distribution found for mmspatialmamba-absent-b' in second.stderr

    def test_shows_the_last_25_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(setup_env, 'LOGS', tmp_path)
        env = setup_env.Environment(Path(sys.executable), tmp_path, own=True)
        code = 'for i in range(40): print(f"<{i}>")\nraise SystemExit(7)'
        with pytest.raises(setup_env.SetupError) as failure:
            env.run('step', 'a step', ['-c', code], 'do this.')
        message = str(failure.value)
        assert 'exit code 7' in message
        assert '| <15>' in message
        assert '| <14>' not in message
        assert failure.value.reason == '<39>'
        assert '<0>' in (tmp_path / 'step.log').read_text()

    def test_refuses_a_folder_that_is_no_environment(self, checkout, tmp_path):
        bare = make_venv(tmp_path / 'bare').parents[2] / 'bin' / 'python'
        folder = tmp_path / 'photos'
        folder.mkdir()
        (folder / 'holiday.txt').write_text('mine')
        result = run_script(checkout, python=bare, MMSPATIALMAMBA_VENV=folder)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert f'{folder} is no virtual environment' in result.stderr
        assert [path.name for path in folder.iterdir()] == ['holiday.txt']


def test_wrapper_of_the_compiler_rewrites_that_flag_alone(tmp_path, monkeypatch):
    show = tmp_path / 'show.py'
    show.write_text('import json, sys; print(json.dumps(sys.argv[1:]))')
    monkeypatch.setenv('CXX', f'{sys.executable} {show} "own argument"')
    wrapper = setup_env.write_cxx20_wrappers(tmp_path)['CXX']
    given = ['-std=c++17', '-DNAME="a  b"', "it's $HOME", '', '-std=c++14', '-x-std=c++17', '*']
    output = subprocess.run([wrapper, *given], capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == ['own argument', '-std=c++20', *given[1:]]


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """An environment with pip and setuptools only, whose pip reaches no index."""
    site_packages = make_venv(tmp_path / 'env')
    for name in ('pip', 'setuptools', 'pkg_resources', '_distutils_hack'):
        for path in (*SITE_PACKAGES.glob(name), *SITE_PACKAGES.glob(f'{name}-*.dist-info')):
            (site_packages / path.name).symlink_to(path)
    (tmp_path / 'links').mkdir()
    (tmp_path / 'logs').mkdir()
    monkeypatch.setattr(setup_env, 'LOGS', tmp_path / 'logs')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.delenv('PIP_CONSTRAINT', raising=False)
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'links'))
    monkeypatch.setenv('PIP_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.delenv('PYTHONPATH', raising=False)
    env = setup_env.Environment(tmp_path / 'env' / 'bin' / 'python', tmp_path / 'env', own=True)
    return env, site_packages, tmp_path / 'links'


def write_distribution(site_packages, name, module, code, version='4.0'):
    write_package(site_packages, module, code)
    info = site_packages / f'{name.replace("-", "_")}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    (info / 'INSTALLER').write_text('pip\n')
    files = [f'{module}/__init__.py', *(f'{info.name}/{path.name}' for path in info.iterdir())]
    (info / 'RECORD').write_text(''.join(f'{file},,\n' for file in [*files, f'{info.name}/RECORD']))


def write_wheel(links, name, version, files, requires=''):
    info = f'{name}-{version}.dist-info'
    metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}'
    tag = 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
    files = {**files, f'{info}/METADATA': metadata, f'{info}/WHEEL': tag}
    files[f'{info}/RECORD'] = ''.join(f'{file},,\n' for file in [*files, f'{info}/RECORD'])
    with zipfile.ZipFile(links / f'{name}-{version}-py3-none-any.whl', 'w') as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


class TestOpenCV:
    @pytest.mark.slow
    def test_absent_is_installed_broken_is_replaced_working_is_kept(self, isolated, capsys):
        env, site_packages, _ = isolated
        assert not setup_env.keeps_opencv(env, env.probe()['versions'])

        broken = 'raise ImportError("libGL.so.1: cannot open shared object file")'
        write_distribution(site_packages, 'opencv-python', 'cv2', broken)
        assert not setup_env.keeps_opencv(env, env.probe()['versions'])
        assert 'opencv-python does not import (ImportError: libGL.so.1' in capsys.readouterr().out
        assert not (site_packages / 'cv2').exists()
        assert 'opencv-python' not in env.probe()['versions']

        write_distribution(site_packages, 'opencv-python', 'cv2', '')
        assert setup_env.keeps_opencv(env, env.probe()['versions'])
        assert (site_packages / 'cv2').exists()


class TestPackages:
    @pytest.mark.slow
    def test_an_active_environment_keeps_its_versions(self, isolated, monkeypatch):
        env, site_packages, links = isolated
        env.own = False
        rows = {'build': ['pip'], 'torch': ['torch'], 'runtime': ['numpy', 'user-of-numpy'], 'tests': []}
        monkeypatch.setattr(setup_env.Environment, 'requirements', lambda self, name: rows[name])
        for name in ('torch', 'numpy', 'opencv-python-headless'):
            write_distribution(site_packages, name, name.replace('-', '_'), '')
        write_wheel(links, 'numpy', '5.0', {})
        write_wheel(links, 'user_of_numpy', '1.0', {}, requires='Requires-Dist: numpy\n')
        write_wheel(links, 'user_of_numpy', '2.0', {}, requires='Requires-Dist: numpy>=5\n')
        setup_env.install_packages(env)
        versions = env.probe()['versions']
        assert (versions['torch'], versions['numpy'], versions['user-of-numpy']) == ('4.0', '4.0', '1.0')


FAKE_SETUP = """
import os, subprocess
from setuptools import setup
source = os.path.abspath('ops.cpp')
subprocess.check_call([os.environ['CXX'], '-std=c++17', *os.environ['CFLAGS'].split(),
                       '-c', source, '-o', source + '.o'])
open('mmcv/_ext.py', 'w').write(f'''flags = {os.environ["CFLAGS"]!r}''')
setup(name='mmcv', version='2.1.0', packages=['mmcv'])
"""


class TestMmcv:
    @pytest.fixture
    def sources(self, isolated):
        """A torch, the libraries without code, and a fake mmcv to build that needs the wrapper and the flags."""
        env, site_packages, links = isolated
        write_distribution(site_packages, 'torch', 'torch', '', version='2.14.1')
        for name, version in (row.split('==') for row in env.requirements('openmmlab')):
            if name != 'mmcv':
                write_wheel(links, name, version, {})
        root = links.parent / 'mmcv-2.1.0'
        write_package(root, 'mmcv', '')
        (root / 'setup.py').write_text(FAKE_SETUP)
        (root / 'ops.cpp').write_text('static_assert(__cplusplus > 201703L);\n')
        (root / 'PKG-INFO').write_text('Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n')
        with tarfile.open(links / 'mmcv-2.1.0.tar.gz', 'w:gz') as archive:
            archive.add(root, arcname=root.name)

    def test_a_wheel_that_loads_is_taken(self, isolated, sources, capsys):
        env, site_packages, links = isolated
        write_wheel(links, 'mmcv', '2.1.0', {'mmcv/__init__.py': '', 'mmcv/_ext.py': 'prebuilt = True'})
        setup_env.install_openmmlab(env)
        assert 'compiling' not in capsys.readouterr().out
        assert (site_packages / 'mmcv' / '_ext.py').read_text() == 'prebuilt = True'
        assert 'mmsegmentation' in env.probe()['versions']

    @pytest.mark.slow
    def test_a_wheel_that_does_not_load_is_rebuilt_once(self, isolated, sources, capsys):
        env, site_packages, links = isolated
        broken = 'raise ImportError("undefined symbol: _ZN5torch")'
        write_wheel(links, 'mmcv', '2.1.0', {'mmcv/__init__.py': '', 'mmcv/_ext.py': broken})
        setup_env.install_openmmlab(env)
        said = capsys.readouterr().out
        assert said.count('compiling mmcv==2.1.0') == 1
        assert 'its ops do not load: ImportError: undefined symbol' in said
        assert '-g0 -w' in (site_packages / 'mmcv' / '_ext.py').read_text()
        setup_env.install_openmmlab(env)
        assert 'compiling' not in capsys.readouterr().out

    @pytest.mark.slow
    def test_without_a_wheel_it_is_compiled(self, isolated, sources, capsys):
        env, site_packages, _ = isolated
        setup_env.install_openmmlab(env)
        assert 'do not load' not in capsys.readouterr().out
        assert '-g0 -w' in (site_packages / 'mmcv' / '_ext.py').read_text()

    @pytest.mark.slow
    def test_without_a_compiler_the_error_tells_what_is_needed(self, isolated, sources, monkeypatch):
        env, _, _ = isolated
        monkeypatch.setenv('CXX', 'no-such-compiler')
        with pytest.raises(setup_env.SetupError, match=r'need a C\+\+ compiler \(apt install g'):
            setup_env.install_openmmlab(env)
        assert 'no-such-compiler: ' in (setup_env.LOGS / 'openmmlab.log').read_text()
