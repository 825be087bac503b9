"""Checkpoints that survive faults, and from which a training resumes as if it had never stopped."""

from __future__ import annotations

import errno
import os
import random
import re
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint

from mmspatialmamba.checkpoint import CheckpointError

INCOMPLETE = '.incomplete'
# What file systems say that have no fsync.
UNSUPPORTED = errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP


@register_backend('atomic_local')
class AtomicLocalBackend(LocalBackend):
    """Backend of local files for mmengine whose ``put`` never leaves half a file."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj``, so that ``filepath`` always holds all of the old content or all of the new.

        The data go to ``filepath + '.incomplete'``, which takes the name ``filepath`` once they are on the disk. The
        folder is created if there is none. Where a file system cannot say that data are on the disk, as some network
        and shared folders, this goes without.

        Raises:
            CheckpointError: If it cannot be written. The old content is still there then.
        """
        incomplete = Path(f'{filepath}{INCOMPLETE}')
        try:
            incomplete.parent.mkdir(parents=True, exist_ok=True)
            try:
                with incomplete.open('wb') as file:
                    file.write(obj)
                    file.flush()
                    try:
                        os.fsync(file.fileno())
                    except OSError as error:
                        if error.errno not in UNSUPPORTED:
                            raise
                os.replace(incomplete, filepath)
            finally:
                incomplete.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f'cannot write {filepath}: {error.strerror}. What was saved before is untouched: '
                'when this is mended, run the same command with --resume'
            ) from error
        # The file is complete, and folders cannot be opened on Windows, nor flushed everywhere else.
        with suppress(OSError):
            folder = os.open(incomplete.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def get_random_state() -> dict:
    """Get the states of the random generators of Python, NumPy, torch and, where it is in use, the current CUDA device.

    They are numbers, and CPU tensors of uint8, which ``torch.load`` reads with ``weights_only``.
    """
    name, keys, *rest = np.random.get_state()
    numpy_state = name, keys.tolist(), *rest
    state = {'python': random.getstate(), 'numpy': numpy_state, 'torch': torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Set the random generators to the states that :func:`get_random_state` returned, on whichever device."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def is_intact(path: str | Path) -> bool:
    """Check a checkpoint file, which may be missing, against the checksums of its zip archive; build no tensor.

    A sharded checkpoint is a folder, and is not checked.
    """
    try:
        if Path(path).is_dir():
            return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error):
        return False


def find_intact_checkpoint(last: str | Path, folder: str | Path, filename_tmpl: str) -> str | None:
    """Find the newest checkpoint that is whole: ``last``, or else one saved before it, if any.

    Of each name, the one in ``folder`` goes before the one in the folder of ``last``, from which a work_dir may have
    been moved or copied.
    """
    pattern = re.compile(re.escape(filename_tmpl).replace(r'\{\}', r'(\d+)'))
    folders = dict.fromkeys((Path(folder), Path(last).parent))
    matches = (pattern.fullmatch(path.name) for folder in folders for path in folder.glob('*'))
    names = {int(match[1]): match[0] for match in matches if match}
    match = pattern.fullmatch(Path(last).name)
    older = [names[step] for step in sorted(names, reverse=True) if match is None or step < int(match[1])]
    paths = (folder / name for name in (Path(last).name, *older) for folder in folders)
    return next((str(path) for path in paths if is_intact(path)), None)


def _seed_worker(init: Callable[[int], None] | None, epoch: int, worker_id: int) -> None:
    """Seed a data loader's worker as its ``worker_init_fn`` does, but differently in each epoch."""
    if init is not None:
        init(worker_id)
    seed = int(np.random.SeedSequence([torch.initial_seed(), epoch]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _call_after(iterator: Iterator, count: int, function: Callable[[], None]) -> Iterator:
    """Yield what ``iterator`` yields; call ``function`` once, before the item that follows the first ``count``."""
    yield from islice(iterator, count)
    function()
    yield from iterator


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """Fault-tolerant version of mmengine's ``CheckpointHook``, with the same arguments.

    A run that was killed and resumed ends with the same weights, bit for bit, as an undisturbed one, where the
    arithmetic itself is deterministic. For that:

    - Checkpoints hold the states of the random generators of every process. Resuming with the same number of processes
      restores them; in an iteration-based loop after the batches that were seen already are skipped.
    - An evaluation leaves the random generators as they were. An evaluation that was not finished is done first on
      resuming, so that the best checkpoint and the schedulers see its metrics.
    - In an epoch-based loop the workers of the training data loader, persistent or not, start anew in each epoch, with
      a seed of that epoch.
    - A checkpoint takes its name only when it is whole and on the disk. Outdated checkpoints are removed after that,
      and incomplete files of a killed run at the next start.
    - ``--resume`` skips a damaged checkpoint, with a warning, and takes the one before it. That needs
      ``max_keep_ckpts`` above 1, or the default, which keeps all.
    - A work_dir may be moved or copied: ``--resume`` looks for the last checkpoint there first, and no file of another
      folder is removed.
    """

    _resumed: dict | None = None
    _random_states: list[dict] | None = None
    _before_val: dict | None = None

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint for a ``--resume`` that names none.

        Raises:
            CheckpointError: If there are checkpoints, but none that is whole.
        """
        if not runner._resume or runner._load_from is not None:
            return
        found = ['', None]
        if is_main_process():
            last = find_latest_checkpoint(runner.work_dir) or str(Path(runner.work_dir, 'last_checkpoint'))
            folder = Path(self.out_dir, Path(runner.work_dir).name) if self.out_dir else runner.work_dir
            if '://' not in last:
                found = [last, find_intact_checkpoint(last, folder, self.filename_tmpl)]
        broadcast_object_list(found)
        last, intact = found
        name = Path(last).name
        if intact is None:
            if name in ('', 'last_checkpoint'):
                return
            raise CheckpointError(
                f'cannot resume: {last} is missing or damaged, and neither its folder nor the work_dir has an older '
                'one that is whole: put a whole one into the work_dir, or start anew with another work_dir'
            )
        if Path(intact).name != name:
            runner.logger.warning(f'{last} is missing or damaged: the run goes on from {intact}')
        runner._load_from = intact

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the random state of this process, and warn where the run cannot be the same."""
        if not runner._resume:
            return
        self._resumed = {'evaluated': checkpoint['meta'].get('evaluated', True)}
        saved, seed = checkpoint['meta'].get('seed'), runner._randomness_cfg.get('seed')
        if saved != seed:
            runner.logger.warning(
                f'The checkpoint is of a run with random seed {saved}, and this one is set up with {seed}: '
                f'the data come in another order. To go on as that run, set randomness.seed={saved}'
            )
        states = checkpoint.get('random_states')
        if states is None:
            runner.logger.warning('The checkpoint holds no random state: this run draws other numbers from here on')
        elif len(states) != get_world_size():
            runner.logger.warning(
                f'The checkpoint is of {len(states)} processes, and these are {get_world_size()}: '
                'their random states are not restored'
            )
        else:
            self._resumed['random_state'] = states[get_rank()]

    def before_train(self, runner: Runner) -> None:
        """Remove incomplete files of a killed run, restore random states, and finish an evaluation.

        Raises:
            ValueError: If the deprecated argument ``file_client_args`` is set.
        """
        if self.file_client_args is not None:
            raise ValueError('ResumableCheckpointHook: file_client_args is deprecated, use backend_args')
        super().before_train(runner)
        if self.save_best and len(self.key_indicators) == 1:
            self.best_ckpt_path = self._in_out_dir(self.best_ckpt_path)
        elif self.save_best:
            self.best_ckpt_path_dict = {key: self._in_out_dir(path) for key, path in self.best_ckpt_path_dict.items()}
        if type(self.file_backend) is LocalBackend:
            self.backend_args = {'backend': 'atomic_local'}
            if is_main_process():
                for folder in (self.out_dir, runner.work_dir):
                    for path in Path(folder).glob('*' + INCOMPLETE):
                        runner.logger.info(f'Removing {path}, which a killed run left unfinished')
                        path.unlink(missing_ok=True)
        loop = runner.train_loop
        self._worker_init_fn = loop.dataloader.worker_init_fn
        if self.by_epoch != isinstance(loop, EpochBasedTrainLoop):
            runner.logger.warning(
                f'Checkpoints are saved by {"epoch" if self.by_epoch else "iteration"} in a {type(loop).__name__}: '
                'a resumed run will differ from one that was not interrupted. '
                f'Set by_epoch={not self.by_epoch} in the checkpoint hook'
            )
        if self._resumed is None:
            return
        self.last_ckpt = runner._load_from
        if isinstance(loop, EpochBasedTrainLoop) and self.by_epoch and loop.iter != loop.epoch * len(loop.dataloader):
            runner.logger.warning(
                f'The checkpoint has {loop.iter} iterations in {loop.epoch} epochs, which would be '
                f'{loop.epoch * len(loop.dataloader)} here: learning rates and all else that goes by iteration keep '
                'the old count. To go on as that run, keep the product of batch_size and the number of processes'
            )
        if 'random_state' in self._resumed:
            restore = partial(set_random_state, self._resumed['random_state'])
            restore()
            if isinstance(loop, IterBasedTrainLoop):
                loop.dataloader_iterator = _call_after(loop.dataloader_iterator, loop.iter, restore)
        if not self._resumed['evaluated'] and self._evaluation_is_due(runner):
            runner.logger.info('The evaluation of this checkpoint was not finished: doing it first')
            runner.val_loop.run()

    def _in_out_dir(self, path: str | None) -> str | None:
        """Find the file of that name in the folder of this run, which may have another one's checkpoint."""
        path = path and self.file_backend.join_path(self.out_dir, os.path.basename(path))
        return path if path and self.file_backend.exists(path) else None

    def _evaluation_is_due(self, runner: Runner) -> bool:
        """Say whether the training loop evaluates after the epoch or iteration of the checkpoint."""
        loop = runner.train_loop
        if runner.val_loop is None or self.by_epoch != isinstance(loop, EpochBasedTrainLoop):
            return False
        loop._decide_current_val_interval()
        done, end = (loop.epoch, loop.max_epochs) if self.by_epoch else (loop.iter, loop.max_iters)
        return done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)

    def before_train_epoch(self, runner: Runner) -> None:
        """Restart the data loader's workers of an epoch-based loop, with seeds of this epoch."""
        loader = runner.train_loop.dataloader
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and loader.num_workers > 0:
            loader._iterator = None
            loader.worker_init_fn = partial(_seed_worker, self._worker_init_fn, runner.epoch)

    def before_val(self, runner: Runner) -> None:
        """Keep the states of the random generators."""
        self._before_val = get_random_state()

    def after_val(self, runner: Runner) -> None:
        """Restore the states of the random generators."""
        set_random_state(self._before_val)
        self._before_val = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random states to a checkpoint for resuming."""
        if self._random_states is not None:
            checkpoint['random_states'] = self._random_states

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save a checkpoint for resuming, name it in ``last_checkpoint``, and remove outdated ones, in this order."""
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        outdated = []
        if self.max_keep_ckpts > 0:
            steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            outdated = steps[: -self.max_keep_ckpts]
            # The outdated one stays in the list until it is removed: if this run is killed, the resumed one does it.
            runner.message_hub.update_info('keep_ckpt_ids', steps)
            self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
        self._random_states = all_gather_object(self._before_val or get_random_state())
        runner.save_checkpoint(
            self.out_dir,
            filename,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta={**meta, 'evaluated': self._before_val is not None},
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._random_states = None
        if is_main_process():
            AtomicLocalBackend().put(self.last_ckpt.encode(), Path(runner.work_dir, 'last_checkpoint'))
        for old in outdated:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save new best checkpoints, and remove then those they replace."""
        if not self.save_best:
            return
        single = len(self.key_indicators) == 1
        old = {None: self.best_ckpt_path} if single else self.best_ckpt_path_dict
        if single:
            self.best_ckpt_path = None
        else:
            self.best_ckpt_path_dict = dict.fromkeys(old)
        super()._save_best_checkpoint(runner, metrics)
        new = {None: self.best_ckpt_path} if single else self.best_ckpt_path_dict
        for key, path in old.items():
            if new[key] is None:
                new[key] = path
            elif path not in (None, new[key]):
                self._remove(path)
        if single:
            self.best_ckpt_path = new[None]

    def _remove(self, path: str) -> None:
        """Remove a checkpoint, which for some strategies is a folder."""
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
