"""Run the train and test scripts of mmdet, mmseg and mmpretrain, each with its own configs."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import runpy
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from yaml import YAMLError

from mmspatialmamba.checkpoint import CheckpointError

from .checkpoint_hook import CheckpointFileError

PIP_NAMES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
USAGE = {
    'train': 'python tools/train.py CONFIG [options]',
    'test': 'python tools/test.py CONFIG CHECKPOINT [options]',
}
# What evaluating a config's Python, JSON or YAML raises when the config is at fault.
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    YAMLError,
)


class LaunchError(Exception):
    """A mistake of the caller's, told in one line."""


class Interrupted(Exception):
    """The script was stopped by a signal: its number."""


def load_config(path: str) -> Config:
    """Read a config and do its ``custom_imports``.

    Args:
        path (str): The config file.

    Returns:
        Config: The config.

    Raises:
        LaunchError: If the file does not exist or cannot be read as a config.
    """
    if not Path(path).is_file():
        raise LaunchError(f'there is no config file {path} (working directory: {Path.cwd()})')
    try:
        return Config.fromfile(path)
    except CONFIG_ERRORS as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        cause = error.__context__
        if isinstance(error, ImportError) and cause is not None:
            reason += f' ({" ".join(str(cause).split())})'
        raise LaunchError(f'cannot read config {path}: {reason}') from error


def find_script(scope: str | None, task: str, config: str) -> Path:
    """Find the script that a library installs for its own users.

    Args:
        scope (str, optional): The config's ``default_scope``.
        task (str): 'train' or 'test'.
        config (str): The config file, for the messages.

    Returns:
        Path: The script.

    Raises:
        LaunchError: If the scope is missing or not one of the three libraries, or if the library
            or its script is not installed.
    """
    choice = ', '.join(PIP_NAMES)
    if scope is None:
        raise LaunchError(f'config {config} sets no default_scope: set it to one of {choice}')
    if scope not in PIP_NAMES:
        raise LaunchError(f'config {config} has default_scope {scope!r}: it must be one of {choice}')
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise LaunchError(
            f'config {config} needs {scope}, which is not installed: run "pip install {PIP_NAMES[scope]}"'
        )
    script = Path(spec.origin).parent / '.mim' / 'tools' / f'{task}.py'
    if not script.is_file():
        raise LaunchError(
            f'the installed {scope} lacks its script {script}: '
            f'run "pip install --force-reinstall --no-deps {PIP_NAMES[scope]}"'
        )
    return script


def check_checkpoints(args: Namespace) -> None:
    """Check that a checkpoint named by a local path exists.

    Args:
        args (Namespace): What the library's script parsed.

    Raises:
        LaunchError: If it does not.
    """
    resume = getattr(args, 'resume', None)
    for path in (getattr(args, 'checkpoint', None), None if resume == 'auto' else resume):
        if isinstance(path, str) and '://' not in path and not Path(path).is_file():
            raise LaunchError(f'there is no checkpoint {path} (working directory: {Path.cwd()})')


def _sync_bn_keys(node: object, prefix: str = '') -> Iterator[str]:
    """Yield the dotted key of every ``type='SyncBN'`` in a config."""
    items: list[tuple] = []
    if isinstance(node, dict):
        items = list(node.items())
        if node.get('type') == 'SyncBN':
            yield f'{prefix}type'
    elif isinstance(node, (list, tuple)):
        items = list(enumerate(node))
    for key, value in items:
        yield from _sync_bn_keys(value, f'{prefix}{key}.')


def cpu_options(cfg: Config, tta: bool = False) -> list[str]:
    """List the overrides that a config needs to run as several processes without a GPU.

    mmengine hands ``device_ids`` to DistributedDataParallel, which takes none on the CPU, unless
    ``model_wrapper_cfg`` says otherwise, and refuses SyncBN there. To FullyShardedDataParallel it hands the number of
    a GPU as ``device_id``, unless the strategy's ``model_wrapper`` says otherwise.

    Args:
        cfg (Config): The config, with the caller's own overrides merged. What it says of
            ``model_wrapper_cfg`` is kept.
        tta (bool): Whether the script is to test with test-time augmentation. Defaults to False.

    Returns:
        list[str]: Values for ``--cfg-options``.
    """
    wrapper = cfg.get('model_wrapper_cfg')
    wanted = {'type': 'MMDistributedDataParallel', 'device_ids': None}
    if wrapper is None:
        # With a model_wrapper_cfg, mmengine no longer looks at these.
        wanted['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
        wanted['broadcast_buffers'] = False
        wrapper = {}
    elif wrapper.get('type', wanted['type']) != wanted['type']:
        wanted = {}
    options = [f'model_wrapper_cfg.{k}={v}' for k, v in wanted.items() if k not in wrapper]
    if cfg.get('strategy', {}).get('type') in ('FSDPStrategy', 'ResumableFSDPStrategy'):
        options = ['strategy.model_wrapper.device_id=cpu']
    keys = list(_sync_bn_keys(cfg.to_dict()))
    if tta and cfg.default_scope == 'mmpretrain':
        # Of the three, only mmpretrain's script wraps the model before it merges the options.
        keys = [re.sub(r'^model\.', 'model.module.', key) for key in keys]
    options += [f'{key}=BN' for key in keys]
    if cfg.get('sync_bn') is not None:
        options.append('sync_bn=None')
    return options


def use_cpu_amp(cfg: Config, args: Namespace, argv: list[str]) -> list[str]:
    """Replace mmengine's mixed precision, which needs a GPU, by bfloat16 autocast where it is asked for.

    Args:
        cfg (Config): The config, with the caller's own overrides merged.
        args (Namespace): What the library's script parsed.
        argv (list[str]): The script's arguments.

    Returns:
        list[str]: The arguments to use.
    """
    if not args.amp and cfg.get('optim_wrapper', {}).get('type') != 'AmpOptimWrapper':
        return argv
    option = 'optim_wrapper.type=CPUAmpOptimWrapper'
    if int(os.environ.get('RANK', 0)) == 0:
        print(
            f'No GPU: mixed precision is bfloat16 autocast of backbone and neck, with --cfg-options {option}',
            flush=True,
        )
    return [argument for argument in argv if argument != '--amp'] + ['--cfg-options', option]


def metrics_options(cfg: Config) -> list[str]:
    """List the overrides that let one of several processes alone write the metrics of a test.

    Args:
        cfg (Config): The config. A logger hook other than mmengine's is kept.

    Returns:
        list[str]: Values for ``--cfg-options``.
    """
    hook = cfg.get('default_hooks', {}).get('logger', {'type': 'LoggerHook'})
    if hook is None or hook.get('type') != 'LoggerHook':
        return []
    return ['default_hooks.logger.type=MainProcessLoggerHook']


def start_cpu_process(cfg: Config, args: Namespace, task: str) -> list[str]:
    """Join the group of CPU processes, over gloo.

    mmengine's launchers need a GPU, but its Runner uses a process group that exists already.

    Args:
        cfg (Config): The config, with the caller's own overrides merged.
        args (Namespace): What the library's script parsed.
        task (str): 'train' or 'test'.

    Returns:
        list[str]: The arguments to add to the script's.

    Raises:
        LaunchError: If the processes were not started by torchrun.
    """
    if args.launcher != 'pytorch':
        raise LaunchError(
            f'--launcher {args.launcher} needs a GPU and this machine has none: '
            f'for CPU processes use tools/dist_{task}.sh'
        )
    if 'RANK' not in os.environ:
        raise LaunchError(f'--launcher pytorch needs processes started by torchrun: use tools/dist_{task}.sh')
    options = cpu_options(cfg, getattr(args, 'tta', False))
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    dist.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))
    if dist.get_rank() == 0:
        print(
            f'No GPU: {dist.get_world_size()} CPU processes over gloo, with --cfg-options {" ".join(options)}',
            flush=True,
        )
    return ['--cfg-options', *options] if options else []


@contextmanager
def interruptible() -> Iterator[None]:
    """Stop what runs inside at SIGINT, as Ctrl-C sends it, and SIGTERM, as torchrun and batch systems do.

    Raises:
        Interrupted: If one of them came, whatever became of it inside.
    """
    process, received = os.getpid(), []

    def stop(signum: int, frame: FrameType | None) -> None:
        # The workers of a data loader are forked with this handler.
        if os.getpid() == process:
            received.append(signum)
            # mmengine has bare excepts, which may swallow the interrupt: it is then repeated.
            signal.alarm(3)
        raise KeyboardInterrupt

    signums = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield
    finally:
        signal.alarm(0)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if received:
            raise Interrupted(received[0])


def resume_advice(cfg: Config, args: Namespace) -> str:
    """Say how to go on with a training that was interrupted.

    Args:
        cfg (Config): The config, with the caller's own overrides merged.
        args (Namespace): What the library's script parsed.

    Returns:
        str: One line.
    """
    work_dir = getattr(args, 'work_dir', None) or cfg.get('work_dir') or Path('work_dirs', Path(cfg.filename).stem)
    last = Path(work_dir, 'last_checkpoint')
    if not last.is_file():
        return f'no checkpoint was saved in {work_dir} yet: run the same command again to start anew'
    return (
        f'the last checkpoint is {last.read_text().strip()}: '
        'to go on from it, run the same command with --resume (and no file after it)'
    )


def launch(task: str, argv: list[str]) -> None:
    """Run a library's own script in this process, with the same arguments.

    Args:
        task (str): 'train' or 'test'.
        argv (list[str]): The config, then whatever the library's script takes.

    Raises:
        LaunchError: If the arguments name something that is not there.
        Interrupted: If the script was stopped by SIGINT, as Ctrl-C sends it, or SIGTERM.
    """
    if argv and argv[0] in ('-h', '--help'):
        print(
            f'usage: {USAGE[task]}\n\nRuns the {task} script of {", ".join(PIP_NAMES)}: the one '
            f"that the config's default_scope names,\nwith all its options. To list them:\n\n"
            f'    python tools/{task}.py CONFIG --help'
        )
        return
    if not argv or argv[0].startswith('-'):
        raise LaunchError(f'the config must be the first argument: {USAGE[task]}')
    cfg = load_config(argv[0])
    script = str(find_script(cfg.get('default_scope'), task, argv[0]))
    sys.argv = [script, *argv]
    args = runpy.run_path(script)['parse_args']()
    check_checkpoints(args)
    on_cpu = get_device() == 'cpu'
    cfg.merge_from_dict(args.cfg_options or {})
    if on_cpu and task == 'train':
        sys.argv = use_cpu_amp(cfg, args, sys.argv)
    if task == 'test' and args.launcher != 'none':
        options = metrics_options(cfg)
        sys.argv += ['--cfg-options', *options] if options else []
    try:
        with interruptible():
            if on_cpu and args.launcher != 'none':
                sys.argv += start_cpu_process(cfg, args, task)
                try:
                    runpy.run_path(script, run_name='__main__')
                finally:
                    dist.destroy_process_group()
            else:
                runpy.run_path(script, run_name='__main__')
    except Interrupted as interrupt:
        if int(os.environ.get('RANK', 0)) == 0:
            advice = resume_advice(cfg, args) if task == 'train' else 'run the same command again'
            print(f'{task}.py: stopped by {signal.Signals(interrupt.args[0]).name}; {advice}', file=sys.stderr)
        raise


def leave(status: int) -> None:
    """End the process.

    Of several processes without a GPU, each ends once its exit functions have run: in what Python does after them, a
    thread of gloo's may abort a process whose work is done.

    Args:
        status (int): The exit status.
    """
    if 'RANK' in os.environ and get_device() == 'cpu':
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(task: str) -> int:
    """Run ``tools/train.py`` or ``tools/test.py``.

    Args:
        task (str): 'train' or 'test'.

    Returns:
        int: The exit status: 0; 1 if a checkpoint could not be written or read; 2 after a mistake in the
        arguments; 128 and the signal's number after Ctrl-C or SIGTERM.
    """
    try:
        launch(task, sys.argv[1:])
    except (LaunchError, CheckpointError, CheckpointFileError) as error:
        print(f'{task}.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, LaunchError) else 1
    except Interrupted as interrupt:
        return 128 + interrupt.args[0]
    return 0
