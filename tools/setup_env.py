"""Install what the demo and the tests need, and print each step with the time it took.

Everything goes into the active environment if that has torch, else into a virtual environment: the folder that
``MMSPATIALMAMBA_VENV`` names, or ``.venv``. What is installed already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LOGS = REPO / 'build' / 'setup-logs'
LIBRARY = REPO / 'mmspatialmamba' / 'ops' / '_native.so'
OLDEST_PYTHON = (3, 11)
TORCH_NEEDS_CXX20 = (2, 14)
OPENCV = 'opencv-python-headless'
OTHER_OPENCVS = ('opencv-python', 'opencv-contrib-python', 'opencv-contrib-python-headless')
MMCV_ADVICE = (
    "read the first error of the log. To compile, mmcv's ops need a C++ compiler (apt install g++; CXX names another), "
    'for a GPU nvcc too (CUDA_HOME names its toolkit; CUDA_VISIBLE_DEVICES= builds for the CPU alone), and memory '
    '(MAX_JOBS=1 takes least). A wheel in a folder that PIP_FIND_LINKS names needs none of these.'
)

# Prints what is installed: versions by name, the origin of this package, and a fingerprint of all files.
PROBE = """
import hashlib, importlib.metadata, json, re
found = {}
for dist in importlib.metadata.distributions():
    found.setdefault(re.sub('[-_.]+', '-', dist.metadata['Name'] or '').lower(), dist)
records = sorted((name, dist.version, dist.read_text('RECORD')) for name, dist in found.items())
this = found.get('mmspatialmamba')
print(json.dumps({
    'versions': {name: dist.version for name, dist in found.items()},
    'origin': this and json.loads(this.read_text('direct_url.json') or 'null'),
    'fingerprint': hashlib.sha256(repr(records).encode()).hexdigest(),
}))
"""

VERIFY = """
import warnings
warnings.simplefilter('ignore')
import torch, torchvision, cv2, mmengine, mmcv, mmcv.ops, mmdet, mmseg, mmpretrain, mmspatialmamba
libraries = torch, torchvision, cv2, mmengine, mmcv, mmdet, mmseg, mmpretrain, mmspatialmamba
print(', '.join(f'{m.__name__} {m.__version__}' for m in libraries))
"""


class SetupError(Exception):
    """A failed step: the message names it and what to do; ``reason`` is the last line of its output."""

    def __init__(self, message: str, reason: str = '') -> None:
        super().__init__(message)
        self.reason = reason[:200]


@dataclass
class Environment:
    """The environment to install into.

    Args:
        python (Path): Its interpreter.
        root (Path): The folder of the virtual environment, or the prefix of the active one.
        own (bool): Whether it belongs to this project. There, all pins hold. In any other, installed packages keep
            their versions, pip chooses the versions of the missing ones, and only OpenMMLab's pins hold.
    """

    python: Path
    root: Path
    own: bool

    def requirements(self, name: str) -> list[str]:
        """Read ``requirements/NAME.txt``, without the pins that do not hold here."""
        lines = read(REPO / 'requirements' / f'{name}.txt').splitlines()
        rows = [line.strip() for line in lines if line.strip() and not line.startswith('#')]
        return rows if self.own or name == 'openmmlab' else [re.sub(r'==[^;\s]+', '', row) for row in rows]

    def probe(self) -> dict:
        """Return what ``PROBE`` prints."""
        result = subprocess.run([self.python, '-c', PROBE], capture_output=True, text=True, cwd=LOGS, check=False)
        if result.returncode:
            reason = (result.stderr.strip() or 'no message').splitlines()[-1]
            raise SetupError(f'{self.python} cannot be used ({reason}): repair or remove {self.root}, and start again.')
        return json.loads(result.stdout)

    def run(self, name: str, what: str, command: list, advice: str, **variables: str) -> list[str]:
        """Run a command with its output in ``NAME.log``, and print what it is for and how long it took.

        Args:
            name (str): Name of the log.
            what (str): What the command is for.
            command (list): The arguments of this environment's Python.
            advice (str): What to do if it fails.
            **variables (str): Environment variables to add.

        Returns:
            list[str]: The lines of its output.

        Raises:
            SetupError: If the exit code is not 0.
        """
        print(f'setup: {what} ...', flush=True)
        log, start = LOGS / f'{name}.log', time.monotonic()
        command = [str(part) for part in (self.python, *command)]
        environment = {**os.environ, 'PIP_DISABLE_PIP_VERSION_CHECK': '1', **variables}
        with log.open('w', encoding='utf-8') as out:
            streams = {'stdin': subprocess.DEVNULL, 'stdout': out, 'stderr': subprocess.STDOUT}
            code = subprocess.run(command, **streams, cwd=LOGS, env=environment, check=False).returncode
        lines = read(log).splitlines() or ['(it printed nothing)']
        if code:
            tail = '\n'.join(f'  | {line}' for line in lines[-25:])
            message = (
                f'This command failed with exit code {code}:\n  {shlex.join(command)}\n'
                f'The end of its output:\n{tail}\nAll of it: {log}\n'
                f'What to do: {advice} Then run this again: it continues from here.'
            )
            raise SetupError(message, lines[-1])
        print(f'setup:   done in {time.monotonic() - start:.1f} s', flush=True)
        return lines


def read(path: Path) -> str:
    """Read a text file; one that does not exist is empty."""
    return path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''


def choose_environment() -> Environment:
    """Return the active environment if it has torch and is not this project's own, else this project's own."""
    named = os.environ.get('MMSPATIALMAMBA_VENV')
    venv = Path(named).expanduser().absolute() if named else REPO / '.venv'
    prefix = Path(sys.prefix)
    if prefix.resolve() != venv.resolve() and importlib.util.find_spec('torch'):
        return Environment(Path(sys.executable), prefix, own=False)
    return Environment(venv / 'bin' / 'python', venv, own=True)


def make_venv(env: Environment) -> None:
    """Make the virtual environment, unless it exists and works."""
    works = [env.python, '-c', 'import pip']
    if env.python.exists() and subprocess.run(works, capture_output=True, check=False).returncode == 0:
        return
    if sys.version_info < OLDEST_PYTHON:
        needed, found = '.'.join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        raise SetupError(
            f'The pinned packages need Python {needed} or newer, but {sys.executable} is {found}. Start this script '
            f'with a newer Python (make PYTHON=python{needed} ...), or activate an environment that has torch.'
        )
    if env.root.exists() and not (env.root / 'pyvenv.cfg').exists() and any(env.root.iterdir()):
        raise SetupError(f'{env.root} is no virtual environment, and not empty: move it, or set MMSPATIALMAMBA_VENV.')
    print(f'setup: virtual environment {env.root} ...', flush=True)
    if subprocess.run([sys.executable, '-m', 'venv', '--clear', env.root], check=False).returncode:
        raise SetupError('The venv module is missing or broken (Debian and Ubuntu: apt install python3-venv).')


def keeps_opencv(env: Environment, versions: dict) -> bool:
    """Tell whether an OpenCV other than ours stays. One that does not import is removed: all install one folder."""
    others = [name for name in OTHER_OPENCVS if name in versions]
    if OPENCV in versions and not others:
        return False
    try:
        env.run('opencv', 'looking for another OpenCV', ['-c', 'import cv2'], '')
    except SetupError as error:
        if others:
            what = f'{" and ".join(others)} does not import ({error.reason}): replaced by {OPENCV}'
            env.run('opencv-removal', what, ['-m', 'pip', 'uninstall', '--yes', *others, OPENCV], 'remove it by hand.')
        return False
    return True


def install_packages(env: Environment) -> None:
    """Install build tools, torch, and what the libraries, the demo and the tests import."""
    install = ['-m', 'pip', 'install']
    advice = f'check that {env.python} has pip (-m ensurepip), that it reaches its index, and that there is disk space.'
    env.run('build-tools', 'build tools', [*install, *env.requirements('build')], advice)
    versions = env.probe()['versions']
    rows = [row for name in ('torch', 'runtime', 'tests') for row in env.requirements(name)]
    if keeps_opencv(env, versions):
        rows = [row for row in rows if not row.startswith(OPENCV)]
    kept = [] if env.own else [f'{name}=={versions[name]}\n' for name in rows if name in versions]
    (LOGS / 'constraints.txt').write_text(''.join(kept), encoding='utf-8')
    what = f'{rows[0]} (a large download) and {len(rows) - 1} other packages'
    env.run('packages', what, [*install, *rows, '-c', 'constraints.txt'], advice)


def write_cxx20_wrappers(folder: Path) -> dict[str, str]:
    """Write scripts that call the C++ and the CUDA compiler with C++20 where C++17 is asked for.

    mmcv's build forces ``-std=c++17``, and the headers of newer torch need C++20.
    Return their paths, by the environment variable that names the compiler.
    """
    nvcc = Path(os.environ.get('CUDA_HOME') or '/usr/local/cuda', 'bin', 'nvcc')
    compilers = {
        'CXX': next(filter(shutil.which, ('c++', 'g++', 'clang++')), 'c++'),
        'PYTORCH_NVCC': nvcc if nvcc.exists() else 'nvcc',
    }
    for variable, default in compilers.items():
        compiler = os.environ.get(variable) or default
        (folder / variable).write_text(f'#!/usr/bin/env bash\nexec {compiler} "${{@/#-std=c++17/-std=c++20}}"\n')
        (folder / variable).chmod(0o755)
    return {variable: str(folder / variable) for variable in compilers}


def install_openmmlab(env: Environment) -> None:
    """Install the OpenMMLab libraries, mmcv from a wheel whose ops load, else compiled.

    Without their dependencies, since mmengine asks for the OpenCV that needs libGL.
    """
    install = ['-m', 'pip', 'install', '--no-deps', '--no-build-isolation']
    rebuild = ['--no-cache-dir', '--force-reinstall', '--no-binary=mmcv']
    rows = env.requirements('openmmlab')
    mmcv = [row for row in rows if row.startswith('mmcv=')]
    check = ('mmcv-ops', "loading mmcv's ops", ['-c', 'import torch, mmcv._ext'])
    variables = {'MMCV_WITH_OPS': '1', 'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0 -w'.strip()}
    variables['MAX_JOBS'] = os.environ.get('MAX_JOBS') or str(os.cpu_count())
    with tempfile.TemporaryDirectory(prefix='mmspatialmamba-') as folder:
        if tuple(map(int, env.probe()['versions']['torch'].split('.')[:2])) >= TORCH_NEEDS_CXX20:
            variables.update(write_cxx20_wrappers(Path(folder)))
        what = f'{", ".join(rows)} (6 minutes on 2 cores if mmcv is compiled)'
        env.run('openmmlab', what, [*install, *rows], MMCV_ADVICE, **variables)
        env.run('mmcv', 'importing mmcv', ['-c', 'import torch, mmcv'], 'repair the package that is named there.')
        try:
            env.run(*check, '')
        except SetupError as error:
            what = f'compiling {mmcv[0]} for this torch, since its ops do not load: {error.reason}'
            env.run('mmcv-build', what, [*install, *rebuild, *mmcv], MMCV_ADVICE, **variables)
            env.run(*check, 'compare the versions of torch and mmcv.')


def fingerprint(env: Environment) -> str:
    """Fingerprint what an installation of this checkout is made of, and whether its products exist."""
    sources = [REPO / 'setup.py', REPO / 'mmspatialmamba' / 'version.py', *sorted(REPO.glob('csrc/**/*.*'))]
    products = [path.exists() for path in (LIBRARY, REPO / 'mmspatialmamba' / '.mim' / 'configs')]
    made_of = (env.probe()['versions'].get('torch'), products, *map(read, sources))
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


def install_this(env: Environment) -> None:
    """Install this checkout, editable, and compile its ops, unless that was done from the same sources."""
    made_from, origin = LOGS / 'made-from', env.probe()['origin'] or {}
    here = origin.get('url') == REPO.as_uri() and origin.get('dir_info', {}).get('editable')
    if here and read(made_from) == fingerprint(env):
        return
    LIBRARY.unlink(missing_ok=True)
    what = f'mmspatialmamba, editable from {REPO}, with its ops (2 minutes on 2 cores)'
    command = ['-m', 'pip', 'install', '--verbose', '--no-deps', '--no-build-isolation', '--editable', REPO]
    for line in env.run('mmspatialmamba', what, command, 'read the error above; it is about this checkout.'):
        if line.strip().startswith('mmspatialmamba: '):
            print(f'setup:   {line.strip()}', flush=True)
    made_from.write_text(fingerprint(env), encoding='utf-8')


def set_up(env: Environment) -> None:
    """Install what is missing, and import everything, unless nothing changed since that was done."""
    start = time.monotonic()
    if env.own:
        make_venv(env)
    LOGS.mkdir(parents=True, exist_ok=True)
    print(f'setup: environment {env.root} ({"own" if env.own else "active, because it has torch"})', flush=True)
    verified, wanted = LOGS / 'verified', [read(path) for path in sorted(REPO.glob('requirements/*.txt'))]
    if read(verified) != repr((env, env.probe(), fingerprint(env), wanted)):
        install_packages(env)
        install_openmmlab(env)
        install_this(env)
        advice = 'if a package is broken, remove it with pip uninstall.'
        print(f'setup:   {env.run("verify", "importing everything", ["-c", VERIFY], advice)[-1]}', flush=True)
        verified.write_text(repr((env, env.probe(), fingerprint(env), wanted)), encoding='utf-8')
    print(f'setup: everything is installed ({time.monotonic() - start:.1f} s)', flush=True)


def main() -> None:
    """Parse the arguments, and set up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--print-python', action='store_true', help='print the interpreter to set up, and do nothing')
    env = choose_environment()
    if parser.parse_args().print_python:
        print(env.python)
        return
    try:
        set_up(env)
    except (SetupError, OSError) as error:
        sys.exit(f'setup: failed. {error}')
    except KeyboardInterrupt:
        sys.exit('setup: interrupted; run this again to continue')


if __name__ == '__main__':
    main()
