"""Run the train and test scripts of mmdet, mmseg and mmpretrain, each with its own configs."""

from __future__ import annotations

import atexit
import importlib.util
import os
import runpy
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.registry import type_name

PIP_NAMES = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
HELP = """usage: python tools/{task}.py CONFIG [options]
CONFIG --help lists those of its library. tools/test.py adds --prepare, to test what prepare_for_cpu makes."""


class LaunchError(Exception):
    """A mistake of the caller's, told in one line."""


class Interrupted(Exception):
    """The end of a script that a signal stopped: its number."""


def load_config(path: str) -> Config:
    """Read a config file and import its ``custom_imports``, or raise LaunchError."""
    if not Path(path).is_file():
        raise LaunchError(f'there is no config file {path} (working directory: {Path.cwd()})')
    try:
        return Config.fromfile(path)
    except Exception as error:  # A config is a program, which may raise anything.
        cause = f' ({error.__context__})' if isinstance(error, ImportError) and error.__context__ else ''
        reason = ' '.join(f'{type(error).__name__}: {error}{cause}'.split())
        raise LaunchError(f'cannot read config {path}: {reason}') from error


def find_scope(cfg: Config) -> str | None:
    """Find the library of a config: its ``default_scope``, or else, in a pure Python config, that of its model.

    Raises:
        LaunchError: If the model's class cannot be imported.
    """
    try:
        kind = (cfg.get('model') or {}).get('type')
    except ImportError as error:
        raise LaunchError(f'cannot read config {cfg.filename}: {error}') from error
    names = [base.__module__ for base in kind.__mro__] if isinstance(kind, type) else [str(kind)]
    libraries = (name.split('.')[0] for name in names)
    return cfg.get('default_scope') or next((library for library in libraries if library in PIP_NAMES), None)


def find_script(scope: str | None, task: str, config: str) -> str:
    """Find the script that a config's library installs for its own users, or raise LaunchError."""
    if scope not in PIP_NAMES:
        raise LaunchError(f'config {config} has default_scope {scope!r}: it must be one of {", ".join(PIP_NAMES)}')
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise LaunchError(f'config {config} needs {scope}, which is not installed: pip install {PIP_NAMES[scope]}')
    script = Path(spec.origin).parent / '.mim' / 'tools' / f'{task}.py'
    if not script.is_file():
        raise LaunchError(f'{script} is missing: pip install --force-reinstall --no-deps {PIP_NAMES[scope]}')
    return str(script)


def check_checkpoints(args: Namespace) -> None:
    """Raise LaunchError if a checkpoint that the arguments name by a local path does not exist."""
    for path in (getattr(args, 'checkpoint', None), getattr(args, 'resume', None)):
        if isinstance(path, str) and path != 'auto' and '://' not in path and not Path(path).is_file():
            raise LaunchError(f'there is no checkpoint {path} (working directory: {Path.cwd()})')


def task_options(cfg: Config, args: Namespace, task: str, prepare: bool = False) -> list[str]:
    """List the overrides of a training or a test, where ``cfg`` has the caller's own merged."""
    options = ['default_hooks.prepare.type=PrepareForCPUHook'] if prepare else []
    pretrained, optim = (args.cfg_options or {}).get('pretrained'), cfg.get('optim_wrapper') or {}
    if task == 'train' and pretrained is not None:
        # A variable of the file, which mmengine has used before it merges options.
        options.append(f'model.backbone.init_cfg.checkpoint={pretrained}')
    if task == 'train' and get_device() == 'cpu' and (args.amp or type_name(optim.get('type')) == 'AmpOptimWrapper'):
        # mmengine's mixed precision needs a GPU.
        sys.argv = [argument for argument in sys.argv if argument != '--amp']
        wrapper = ['optim_wrapper.type=CPUAmpOptimWrapper', *['optim_wrapper.dtype=bfloat16'] * ('dtype' in optim)]
        options += wrapper
        tell(f'No GPU: mixed precision is bfloat16 autocast of backbone and neck, --cfg-options {" ".join(wrapper)}')
    if task == 'train' and getattr(args, 'auto_scale_lr', False):
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            reason = f'--auto-scale-lr: config {args.config} does not say for which batch size its learning rate is'
            raise LaunchError(f'{reason}: add auto_scale_lr=dict(base_batch_size=NUMBER), of all processes together')
        # mmdet asks for it, and some of its configs lack it.
        options.append('auto_scale_lr.enable=True')
    logger = cfg.get('default_hooks', {}).get('logger', {'type': 'LoggerHook'})
    if task == 'test' and args.launcher != 'none' and logger and type_name(logger.get('type')) == 'LoggerHook':
        # mmengine's hook writes the metrics of a test once for each process.
        options.append('default_hooks.logger.type=MainProcessLoggerHook')
    return options


def cpu_options(cfg: Config) -> list[str]:
    """List the overrides that keep mmengine from handing a GPU's number to the wrapper of a model on a CPU."""
    if type_name((cfg.get('strategy') or {}).get('type')) in ('FSDPStrategy', 'ResumableFSDPStrategy'):
        return ['strategy.model_wrapper.device_id=cpu']
    wrapper, ddp = cfg.get('model_wrapper_cfg'), 'MMDistributedDataParallel'
    wanted = {'type': ddp, 'device_ids': None}
    if wrapper is None:
        # Without a model_wrapper_cfg, mmengine sets these.
        wanted.update(find_unused_parameters=cfg.get('find_unused_parameters', False), broadcast_buffers=False)
    elif type_name(wrapper.get('type', ddp)) != ddp:
        return []
    return [f'model_wrapper_cfg.{key}={value}' for key, value in wanted.items() if key not in (wrapper or {})]


def bn_options(part: object, key: str = 'model') -> list[str]:
    """List the overrides that name BN where a part of a config has the class ``SyncBatchNorm``, which needs GPUs."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    options = [option for name, value in items for option in bn_options(value, f'{key}.{name}')]
    if isinstance(part, dict) and type_name(part.get('type')) == 'SyncBatchNorm':
        options.append(f'{key}.type=BN')
    return options


def start_cpu_process(cfg: Config, args: Namespace, task: str) -> list[str]:
    """Join the group of CPU processes, which mmengine's Runner uses, and list their overrides, or raise LaunchError."""
    if args.launcher != 'pytorch' or 'RANK' not in os.environ:
        reason = f'--launcher {args.launcher} needs a GPU, which this machine lacks, or CPU processes of torchrun'
        raise LaunchError(f'{reason}: use tools/dist_{task}.sh')
    options = [*cpu_options(cfg), 'sync_bn=None', *bn_options(cfg.get('model'))]
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    dist.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))
    importlib.import_module('mmcv.cnn')  # registers SyncBN
    # For the name SyncBN, which is a default of the libraries' layers too.
    MODELS.register_module('SyncBN', force=True, module=nn.BatchNorm2d)
    tell(f'No GPU: {dist.get_world_size()} CPU processes over gloo, BN for SyncBN, --cfg-options {" ".join(options)}')
    return options


def tell(message: str, file: TextIO | None = None) -> None:
    """Print a line, once for all processes."""
    if os.environ.get('RANK', '0') == '0':
        print(message, file=file, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Stop what runs inside at SIGINT (Ctrl-C) or SIGTERM (torchrun, batch systems), and raise Interrupted."""
    process, received = os.getpid(), []

    def stop(signum: int, frame: object) -> None:
        # The workers of a data loader are forked with this handler.
        if os.getpid() == process:
            received.append(signum)
            # mmengine has bare excepts, which may swallow the interrupt: it is then repeated.
            alarm(3)
        raise KeyboardInterrupt

    # Windows has no alarm.
    alarm = getattr(signal, 'alarm', lambda seconds: None)
    known = (getattr(signal, name, None) for name in ('SIGINT', 'SIGTERM', 'SIGALRM'))
    signums = [signum for signum in known if signum is not None and signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield
    finally:
        alarm(0)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if received:
            raise Interrupted(received[0])


def resume_advice(cfg: Config, args: Namespace) -> str:
    """Say how to continue a training that was interrupted."""
    work_dir = args.work_dir or cfg.get('work_dir') or Path('work_dirs', Path(cfg.filename).stem)
    last = Path(work_dir, 'last_checkpoint')
    if not last.is_file():
        return f'no checkpoint was saved in {work_dir} yet: run the same command again to start anew'
    saved = last.read_text().strip()
    moved = Path(work_dir, Path(saved).name).absolute()
    checkpoint = moved if moved.is_file() else saved
    return f'to continue from {checkpoint}, run the same command with --resume (and no file after it)'


def launch(task: str, argv: list[str]) -> None:
    """Run a library's own script in this process: ``argv`` is the config, then the script's arguments."""
    if argv and argv[0] in ('-h', '--help'):
        print(HELP.format(task=task))
        return
    if not argv or argv[0].startswith('-'):
        raise LaunchError(f'the config must be the first argument: python tools/{task}.py CONFIG [options]')
    if task == 'train' and '--prepare' in argv:
        raise LaunchError('--prepare is for tools/test.py: what prepare_for_cpu makes is for inference alone')
    cfg = load_config(argv[0])
    scope = find_scope(cfg)
    script = find_script(scope, task, argv[0])
    sys.argv = [script, *(argument for argument in argv if argument != '--prepare')]
    args = runpy.run_path(script)['parse_args']()
    check_checkpoints(args)
    cfg.merge_from_dict(args.cfg_options or {})
    if scope == 'mmdet' and 'pretrained' in cfg.get('model', {}):
        raise LaunchError(
            f'config {argv[0]} sets model.pretrained, which mmdet does not take: leave it out, and set '
            "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE_OR_URL) to start from weights"
        )
    options = task_options(cfg, args, task, prepare='--prepare' in argv)
    try:
        with interruptible():
            if args.launcher != 'none' and get_device() == 'cpu':
                options += start_cpu_process(cfg, args, task)
            sys.argv += ['--cfg-options', *options] if options else []
            runpy.run_path(script, run_name='__main__')
    except Interrupted as interrupt:
        advice = resume_advice(cfg, args) if task == 'train' else 'run the same command again'
        tell(f'{task}.py: stopped by {signal.Signals(interrupt.args[0]).name}; {advice}', sys.stderr)
        raise
    finally:
        if dist.is_initialized() and get_device() == 'cpu':
            dist.destroy_process_group()


def leave(status: int) -> None:
    """End the process with an exit status."""
    if 'RANK' in os.environ and get_device() == 'cpu':
        # In what Python does after the exit functions, a thread of gloo's may abort a process whose work is done.
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
    except (LaunchError, CheckpointError) as error:
        print(f'{task}.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, LaunchError) else 1
    except Interrupted as interrupt:
        return 128 + interrupt.args[0]
    return 0
