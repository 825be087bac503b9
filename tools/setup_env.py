"""Sets up what the demo and the tests need, and says what it does and how long that takes.

Everything goes into the active environment if that has torch, else into a virtual environment:
``$MMSPATIALMAMBA_VENV``, or ``.venv`` in this checkout. What is there already is left alone, so a
run after a failed one goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

REPO = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
TORCH_NEEDS_CXX20 = (2, 14)
OTHER_OPENCVS = ('opencv-python', 'opencv-contrib-python', 'opencv-contrib-python-headless')

# Runs in the environment that is set up: reads lists of requirements, tells which are not met.
PROBE = """
import hashlib, importlib.metadata, importlib.util, json, re, sys
from pip._vendor.packaging.requirements import Requirement

def canonical(name):
    return re.sub('[-_.]+', '-', name).lower()

versions, records, origin = {}, [], None
for dist in importlib.metadata.distributions():
    name = canonical(dist.metadata['Name'])
    if name in versions:
        continue
    versions[name] = dist.version
    records.append(name + dist.version + (dist.read_text('RECORD') or ''))
    if name == 'mmspatialmamba':
        origin = json.loads(dist.read_text('direct_url.json') or 'null')

def met(requirement):
    if requirement.marker and not requirement.marker.evaluate():
        return True
    version = versions.get(canonical(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)

wanted = json.load(sys.stdin)
missing = {k: [r for r in rows if not met(Requirement(r))] for k, rows in wanted.items()}
print(json.dumps({
    'python': sys.version.split()[0],
    'missing': missing,
    'versions': versions,
    'origin': origin,
    'has_cv2': importlib.util.find_spec('cv2') is not None,
    'fingerprint': hashlib.sha256('\\n'.join(sorted(records)).encode()).hexdigest(),
}))
"""

# Exit code 3: mmcv imports, but its compiled ops do not load.
CHECK_OPS = """
import sys, torch, mmcv
try:
    import mmcv._ext
except ImportError as error:
    print(error)
    sys.exit(3)
"""

DESCRIBE_TORCH = """
import json, os, torch
from torch.utils import cpp_extension
gpu = torch.cuda.is_available() or os.getenv('FORCE_CUDA') == '1'
print(json.dumps([torch.__version__, torch.version.cuda, gpu and torch.version.hip is None,
                  cpp_extension.CUDA_HOME]))
"""

VERIFY = """
import os, warnings
warnings.simplefilter('ignore')
import torch, torchvision, cv2, mmengine, mmcv, mmcv.ops, mmdet, mmseg, mmpretrain, mmspatialmamba
from mmengine.utils import get_installed_path
configs = os.path.join(get_installed_path('mmspatialmamba'), '.mim', 'configs')
assert os.path.isdir(configs), f'{configs} is missing: mmengine finds no config of this package'
libraries = torch, torchvision, cv2, mmengine, mmcv, mmdet, mmseg, mmpretrain, mmspatialmamba
print(', '.join(f'{m.__name__} {m.__version__}' for m in libraries))
"""


class SetupError(Exception):
    """A step failed; the message says which, why, and what to do."""


@dataclass
class Environment:
    """The environment that is set up.

    Args:
        python (Path): Its interpreter.
        root (Path): The folder of the virtual environment, or the prefix of the active one.
        own (bool): Whether it is this project's own, where every pin holds. In anybody else's,
            packages that are there keep their versions, and others get the version pip chooses;
            the pins of the OpenMMLab libraries hold everywhere.
        state (Path): Folder of the logs and of the mark that a verification left.
    """

    python: Path
    root: Path
    own: bool
    state: Path
    _probed: dict | None = field(default=None, repr=False)

    def probe(self) -> dict:
        """Look at what is installed.

        Returns:
            dict: ``python``, ``missing`` (requirements not met, by file), ``versions``, ``origin``
            of this package, ``has_cv2``, and ``fingerprint`` of all that is installed.
        """
        if self._probed is None:
            wanted = json.dumps({name: self.requirements(name) for name in REQUIREMENT_FILES})
            self._probed = json.loads(self.capture([self.python, '-c', PROBE], stdin=wanted))
        return self._probed

    def requirements(self, name: str) -> list[str]:
        """Read ``requirements/NAME.txt``, without the pins that do not hold here."""
        lines = (REPO / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
        rows = [line.strip() for line in lines if line.strip() and not line.startswith('#')]
        if self.own or name == 'openmmlab':
            return rows
        return [re.sub(r'==[^;\s]+', '', row) for row in rows]

    def capture(self, command: list, stdin: str = '') -> str:
        """Run a short command that only looks, and return its standard output."""
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=self.state, check=False)
        if result.returncode:
            tail = result.stderr.strip().splitlines()[-1:] or ['(no message)']
            raise SetupError(
                f'{self.python} cannot be used: {tail[0]}\n'
                f'It needs pip and a working Python: try {self.python} -m ensurepip, or remove '
                f'{self.root} and run this again.'
            )
        return result.stdout

    def attempt(self, name: str, command: list, extra: dict | None = None) -> tuple[int, Path]:
        """Run a command with its output in a log.

        Args:
            name (str): Name of the log.
            command (list): The command and its arguments.
            extra (dict | None): Environment variables to add. Defaults to None.

        Returns:
            tuple[int, Path]: The exit code, and the log.
        """
        self._probed = None
        log = self.state / f'{name}.log'
        command = [str(part) for part in command]
        with log.open('w', encoding='utf-8') as stream:
            stream.write(f'$ {shlex.join(command)}\n')
            stream.flush()
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=self.state,
                env={**os.environ, **(extra or {})},
                check=False,
            ).returncode
        return code, log

    def run(self, name: str, command: list, advice: str, extra: dict | None = None) -> Path:
        """Run a command that must succeed, with its output in a log.

        Args:
            name (str): Name of the log.
            command (list): The command and its arguments.
            advice (str): What to do if it fails.
            extra (dict | None): Environment variables to add. Defaults to None.

        Returns:
            Path: The log.

        Raises:
            SetupError: If the exit code is not 0.
        """
        code, log = self.attempt(name, command, extra)
        if code:
            self.fail(log, code, advice)
        return log

    def fail(self, log: Path, code: int, advice: str) -> NoReturn:
        """Raise the error of a failed step: command, end of its log, what to do."""
        command, *lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
        tail = '\n'.join(f'  | {line}' for line in lines[-25:]) or '  | (it printed nothing)'
        raise SetupError(
            f'This command failed with exit code {code}:\n  {command[2:]}\n'
            f'The end of its output:\n{tail}\n'
            f'All of it: {log}\n'
            f'What to do: {advice} Then run this again: it goes on from here.'
        )

    def pip_install(self, name: str, arguments: list, advice: str = '') -> Path:
        """Install with pip, and return the log."""
        return self.run(
            name,
            [self.python, '-m', 'pip', 'install', '--disable-pip-version-check', *arguments],
            advice or 'check that pip reaches its package index and that the disk is not full.',
        )


REQUIREMENT_FILES = ('build', 'torch', 'runtime', 'tests', 'openmmlab')


def choose_environment() -> Environment:
    """Choose where everything goes.

    Returns:
        Environment: The active one if it has torch and is not this project's own, else this
        project's own, which may not exist yet.
    """
    named = os.environ.get('MMSPATIALMAMBA_VENV')
    venv = Path(named).expanduser().absolute() if named else REPO / '.venv'
    prefix = Path(sys.prefix)
    if prefix.resolve() != venv.resolve() and importlib.util.find_spec('torch'):
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        key = hashlib.sha256(str(prefix).encode()).hexdigest()[:16]
        state = cache / 'mmspatialmamba' / f'setup-{key}'
        return Environment(Path(sys.executable), prefix, own=False, state=state)
    return Environment(venv / 'bin' / 'python', venv, own=True, state=venv / 'setup-logs')


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Print what is about to be done, and then how long it took."""
    print(f'setup: {what} ...', flush=True)
    start = time.monotonic()
    yield
    print(f'setup:   done in {time.monotonic() - start:.1f} s', flush=True)


def make_venv(env: Environment) -> None:
    """Make the virtual environment, unless it is there and works."""
    if env.python.exists():
        works = subprocess.run([env.python, '-c', 'import pip'], capture_output=True, check=False)
        if works.returncode == 0:
            return
    if sys.version_info < OLDEST_PYTHON:
        needed, found = '.'.join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        raise SetupError(
            f'The pinned packages need Python {needed} or newer, but {sys.executable} is {found}. '
            f'Start this script with a newer Python (make PYTHON=python{needed} ...), or activate '
            'an environment that has torch: it is used as it is.'
        )
    if (env.root / 'pyvenv.cfg').exists():
        print(f'setup: {env.root} does not work: it is made anew', flush=True)
        shutil.rmtree(env.root)
    elif env.root.exists() and any(path != env.state for path in env.root.iterdir()):
        raise SetupError(
            f'{env.root} is no virtual environment, and not empty. Move it away, or name another '
            'folder in MMSPATIALMAMBA_VENV.'
        )
    with announced(f'virtual environment {env.root}'):
        env.state.mkdir(parents=True, exist_ok=True)
        env.run(
            'venv',
            [sys.executable, '-m', 'venv', env.root],
            'install the venv module (Debian and Ubuntu: apt install python3-venv).',
        )


def install_build_tools(env: Environment) -> None:
    """Install pip, setuptools and what compiling extensions needs."""
    missing = env.probe()['missing']['build']
    if missing:
        with announced(f'build tools: {", ".join(missing)}'):
            env.pip_install('build-tools', missing)


def install_torch(env: Environment) -> None:
    """Install torch and torchvision. The torch of an active environment stays as it is."""
    missing = env.probe()['missing']['torch']
    if not missing:
        return
    constraints = REPO / 'requirements' / 'runtime.txt'
    if not env.own:
        constraints = env.state / 'torch-constraints.txt'
        version = env.probe()['versions']['torch'].split('+')[0]
        constraints.write_text(f'torch=={version}\n', encoding='utf-8')
    with announced(f'{", ".join(missing)} (a large download)'):
        env.pip_install('torch', [*missing, '-c', constraints])


def settle_opencv(env: Environment) -> list[str]:
    """Decide about OpenCV: one distribution, and it must import.

    Returns:
        list[str]: What pip has to install, after what is broken was removed.
    """
    probed = env.probe()
    headless = [r for r in env.requirements('runtime') if r.startswith('opencv-python-headless')]
    missing = [r for r in headless if r in probed['missing']['runtime']]
    others = [name for name in OTHER_OPENCVS if name in probed['versions']]
    alone = 'opencv-python-headless' in probed['versions'] and not others
    if alone or not (others or probed['has_cv2']):
        return missing
    if verified(env):
        return []
    code, log = env.attempt('opencv', [env.python, '-c', 'import cv2'])
    if code == 0:
        return []
    if not others:
        env.fail(log, code, 'remove this OpenCV, which pip did not install.')
    reason = log.read_text(encoding='utf-8').strip().splitlines()[-1]
    with announced(f'{", ".join(others)} does not import ({reason}): replaced by {headless[0]}'):
        env.run(
            'opencv-removal',
            [env.python, '-m', 'pip', 'uninstall', '--yes', *OTHER_OPENCVS] + ['opencv-python-headless'],
            f'remove {" and ".join(others)} by hand.',
        )
    return headless


def install_third_party(env: Environment) -> None:
    """Install what the libraries, the demo and the tests import."""
    opencv = settle_opencv(env)
    missing = env.probe()['missing']
    rows = [*missing['runtime'], *missing['tests']]
    rows = [row for row in rows if not row.startswith('opencv-python-headless')] + opencv
    if rows:
        some = ', '.join(rows[:3]) + (f' and {len(rows) - 3} more' if len(rows) > 3 else '')
        with announced(f'packages: {some}'):
            env.pip_install('packages', rows)


def install_libraries(env: Environment) -> None:
    """Install the OpenMMLab libraries that have nothing to compile.

    Without their dependencies, since mmengine asks for the OpenCV that needs libGL.
    """
    missing = [row for row in env.probe()['missing']['openmmlab'] if not row.startswith('mmcv=')]
    if missing:
        with announced(f'OpenMMLab: {", ".join(missing)}'):
            env.pip_install('openmmlab', ['--no-deps', *missing])


def install_mmcv(env: Environment) -> None:
    """Install mmcv with its ops: a prebuilt wheel if pip finds one that loads, else compiled."""
    (row,) = (row for row in env.requirements('openmmlab') if row.startswith('mmcv='))
    if verified(env):
        return
    if row in env.probe()['missing']['openmmlab']:
        with announced(f'{row}: looking for a prebuilt wheel'):
            code, _ = env.attempt(
                'mmcv-wheel',
                [env.python, '-m', 'pip', 'install', '--disable-pip-version-check', '--no-deps']
                + ['--only-binary', 'mmcv', row],
            )
        if code:
            print('setup:   there is none that fits', flush=True)
            build_mmcv(env, row, again=False)
    if not ops_load(env):
        build_mmcv(env, row, again=True)
        if not ops_load(env):
            raise SetupError(f'{row} was compiled, but its ops do not load: see {env.state / "mmcv-check.log"}')


def ops_load(env: Environment) -> bool:
    """Tell whether mmcv's compiled ops load with the torch that is there."""
    with announced("loading mmcv's ops"):
        code, log = env.attempt('mmcv-check', [env.python, '-c', CHECK_OPS])
    if code == 3:
        reason = log.read_text(encoding='utf-8').strip().splitlines()[-1]
        print(f'setup:   they do not load with this torch: {reason[:200]}', flush=True)
    elif code:
        env.fail(log, code, 'repair the package that is named there.')
    return code == 0


def build_mmcv(env: Environment, row: str, again: bool) -> None:
    """Compile mmcv.

    Args:
        env (Environment): Where it goes.
        row (str): The requirement.
        again (bool): Whether to replace a build that does not load, passing by pip's cache.
    """
    compiler = find_compiler()
    torch_version, cuda_version, with_cuda, cuda_home = json.loads(env.capture([env.python, '-c', DESCRIBE_TORCH]))
    nvcc = os.environ.get('PYTORCH_NVCC') or str(Path(cuda_home or '', 'bin', 'nvcc'))
    if with_cuda and not shutil.which(shlex.split(nvcc)[0]):
        raise SetupError(
            f"torch sees a GPU, but there is no nvcc to compile mmcv's ops for it: install the "
            f'CUDA {cuda_version} toolkit and set CUDA_HOME, or set CUDA_VISIBLE_DEVICES= (empty) '
            'to build for, and run on, the CPU alone.'
        )
    variables = {
        'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0 -w'.strip(),
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': os.environ.get('MAX_JOBS') or str(os.cpu_count()),
    }
    fresh = ['--no-cache-dir', '--force-reinstall'] if again else []
    with tempfile.TemporaryDirectory(prefix='mmspatialmamba-') as folder:
        if tuple(map(int, torch_version.split('.')[:2])) >= TORCH_NEEDS_CXX20:
            variables['CXX'] = str(write_cxx20_wrapper(Path(folder, 'c++'), compiler))
            if with_cuda:
                wrapper = write_cxx20_wrapper(Path(folder, 'nvcc'), shlex.split(nvcc))
                variables['PYTORCH_NVCC'] = str(wrapper)
        with announced(f'compiling {row} (about 6 minutes on 2 cores)'):
            env.run(
                'mmcv-build',
                [env.python, '-m', 'pip', 'install', '--disable-pip-version-check', '--verbose']
                + ['--no-deps', '--no-build-isolation', '--no-binary', 'mmcv', *fresh, row],
                'read the first error of the log; if the compiler was killed, memory ran out: set MAX_JOBS=1.',
                variables,
            )


def find_compiler() -> list[str]:
    """Find the C++ compiler.

    Returns:
        list[str]: The command in ``CXX``, else the first of c++, g++ and clang++ that exists.

    Raises:
        SetupError: If there is none.
    """
    named = shlex.split(os.environ.get('CXX', ''))
    for command in [named] if named else [['c++'], ['g++'], ['clang++']]:
        if shutil.which(command[0]):
            return command
    raise SetupError(
        f"No C++ compiler ({named[0] if named else 'c++, g++ or clang++'}) to compile mmcv's ops: "
        'install one (Debian and Ubuntu: apt install g++) or name it in CXX; or add a folder with '
        'an mmcv wheel that fits to PIP_FIND_LINKS.'
    )


def write_cxx20_wrapper(path: Path, compiler: list[str]) -> Path:
    """Write a script that calls a compiler with C++20 where C++17 is asked for.

    mmcv's build forces ``-std=c++17``, and the headers of newer torch need C++20.

    Args:
        path (Path): Where to write it.
        compiler (list[str]): The compiler's command.

    Returns:
        Path: ``path``.
    """
    path.write_text(
        '#!/bin/sh\n'
        'for argument do\n'
        '  shift\n'
        '  if [ "$argument" = -std=c++17 ]; then argument=-std=c++20; fi\n'
        '  set -- "$@" "$argument"\n'
        'done\n'
        f'exec {shlex.join(compiler)} "$@"\n',
        encoding='utf-8',
    )
    path.chmod(0o755)
    return path


def sources_of_the_ops(env: Environment) -> str:
    """Fingerprint what the compiled ops are made of: their sources, how they are built, and torch."""
    digest = hashlib.sha256(env.probe()['versions'].get('torch', '').encode())
    for path in [REPO / 'setup.py', *sorted(REPO.glob('csrc/**/*.*'))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install_this(env: Environment) -> None:
    """Install this checkout, editable, and compile its ops, unless this very checkout is installed."""
    probed = env.probe()
    origin = probed['origin'] or {}
    version = runpy.run_path(str(REPO / 'mmspatialmamba' / 'version.py'))['__version__']
    library, built = REPO / 'mmspatialmamba' / 'ops' / '_native.so', env.state / 'ops-built-from'
    sources = sources_of_the_ops(env)
    if (
        origin.get('url') == REPO.as_uri()
        and origin.get('dir_info', {}).get('editable')
        and probed['versions']['mmspatialmamba'] == version
        and (REPO / 'mmspatialmamba' / '.mim' / 'configs').exists()
        and (built.exists() and built.read_text(encoding='utf-8') == f'{sources} {library.exists()}')
    ):
        return
    library.unlink(missing_ok=True)
    with announced(f'mmspatialmamba {version}, editable from {REPO}, with its ops (about 2 minutes on 2 cores)'):
        log = env.pip_install(
            'mmspatialmamba',
            ['--verbose', '--no-deps', '--no-build-isolation', '--editable', REPO],
            'read the error above; it is about this checkout.',
        )
        said = re.findall(r'(?m)^\s*mmspatialmamba: (.*)', log.read_text(encoding='utf-8', errors='replace'))
        for line in dict.fromkeys(said):
            print(f'setup:   {line}', flush=True)
        if not library.exists():
            print(f'setup:   the ops run on plain PyTorch; all the output: {log}', flush=True)
    built.write_text(f'{sources} {library.exists()}', encoding='utf-8')


def mark(env: Environment) -> Path:
    """Name the file that holds the fingerprint of what was verified last."""
    return env.state / 'verified'


def verified(env: Environment) -> bool:
    """Tell whether exactly what is installed now was verified before."""
    path = mark(env)
    return path.exists() and path.read_text(encoding='utf-8') == env.probe()['fingerprint']


def verify(env: Environment) -> None:
    """Import everything, once for each state of the environment."""
    if verified(env):
        return
    with announced('importing everything'):
        log = env.run(
            'verify',
            [env.python, '-c', VERIFY],
            'if a package is broken, remove it with pip uninstall.',
        )
        print(f'setup:   {log.read_text(encoding="utf-8").splitlines()[-1]}', flush=True)
    mark(env).write_text(env.probe()['fingerprint'], encoding='utf-8')


def set_up(env: Environment) -> None:
    """Do every step that is not done yet.

    Raises:
        SetupError: If a step fails.
    """
    start = time.monotonic()
    if env.own:
        make_venv(env)
    env.state.mkdir(parents=True, exist_ok=True)
    whose = 'own' if env.own else 'active, because it has torch'
    print(f'setup: environment {env.root} ({whose}; Python {env.probe()["python"]})', flush=True)
    install_build_tools(env)
    install_torch(env)
    install_third_party(env)
    install_libraries(env)
    install_mmcv(env)
    install_this(env)
    verify(env)
    print(f'setup: everything is there ({time.monotonic() - start:.1f} s)', flush=True)


def main() -> None:
    """Parse the arguments and set up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--print-python',
        action='store_true',
        help='print the interpreter of the environment that would be set up, and do nothing',
    )
    args = parser.parse_args()
    env = choose_environment()
    if args.print_python:
        print(env.python)
        return
    try:
        set_up(env)
    except (SetupError, OSError) as error:
        sys.exit(f'setup: failed. {error}')
    except KeyboardInterrupt:
        sys.exit('setup: interrupted; run this again to go on from here')


if __name__ == '__main__':
    main()
