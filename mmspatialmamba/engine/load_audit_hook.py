from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint, get_state_dict
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError, audit, register_checkpoint_loaders, to_mmengine
from mmspatialmamba.checkpoint.reader import pop_note


@HOOKS.register_module()
class LoadAuditHook(Hook):
    """Audit of every checkpoint that the runner loads, by ``load_from``, ``resume`` or for a test.

    The runner reads its checkpoint by :func:`mmspatialmamba.checkpoint.read_checkpoint`, and the audit comes before any
    weight changes. A good checkpoint is logged in one line. One that lacks anything it should hold is logged in a
    table, and refused. The checkpoint of a classifier or of a self-supervised training starts the backbone of a
    detector or segmentor; heads, neck and output norms keep their initial values, and the line says so. A file that the
    whole model's ``init_cfg`` names is read in the same way, and the backbone audits its part.

    Args:
        max_missing (int): How many tensors may be missing from the file, of another shape or, in the backbone, left
            over. Defaults to 0.
        fresh (Sequence[str]): Names of modules and parameters that keep their initial values where the file has none of
            that shape, such as 'head.fc' for another number of classes. Defaults to ().
        allow_nan (bool): Whether to take NaN and infinite weights. Defaults to False.
        inflate_stem (bool): Whether :func:`mmspatialmamba.checkpoint.inflate` fits the first convolution to another
            number of image channels. Defaults to False.
    """

    # Before EMAHook and others that use the checkpoint.
    priority = 'VERY_HIGH'

    def __init__(
        self, max_missing: int = 0, fresh: Sequence[str] = (), allow_nan: bool = False, inflate_stem: bool = False
    ) -> None:
        fresh = (fresh,) if isinstance(fresh, str) else tuple(fresh)
        self.options = dict(fresh=fresh, max_missing=max_missing, allow_nan=allow_nan, inflate_stem=inflate_stem)

    def before_run(self, runner: Runner) -> None:
        """Let mmengine read this run's checkpoints, and no others outside its work_dir, by ``read_checkpoint``."""
        configs = getattr(self._unwrap(runner.model), 'init_cfg', None) or []
        # mmpretrain's model.pretrained is a checkpoint there.
        files = [cfg.get('checkpoint') for cfg in ([configs] if isinstance(configs, dict) else configs)]
        files.append(runner._load_from)
        if runner._resume and not runner._load_from:
            files += [runner.work_dir, find_latest_checkpoint(runner.work_dir)]
        for filename in filter(None, files):
            if filename.startswith(('http://', 'https://')) or '://' not in filename:
                register_checkpoint_loaders(re.escape(filename))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Audit a checkpoint, and leave in it the model's names, and its own values for what starts fresh.

        Raises:
            CheckpointError: If the checkpoint does not hold what it should, or if a run is to be resumed whose
                parameters had other names.
        """
        model = self._unwrap(runner.model)
        converted = to_mmengine(checkpoint) or checkpoint
        state = converted.get('state_dict', converted)
        note = pop_note(state)
        source = note.get('file', 'the checkpoint')
        checkpoint['state_dict'] = self._audited(state, model, source)
        if not runner._resume:
            return
        if converted is not checkpoint or note.get('renamed'):
            raise CheckpointError(
                f'cannot resume from {source}: its parameters have the names and the order of the original release or '
                'of an earlier version, so that its optimizer state fits others: start from its weights, by load_from '
                'without resume'
            )
        if 'ema_state_dict' in checkpoint:
            averaged = {k[len('module.') :]: v for k, v in checkpoint['ema_state_dict'].items() if k != 'steps'}
            self._audited(averaged, model, f'{source} (ema_state_dict)')

    @staticmethod
    def _unwrap(model: nn.Module) -> nn.Module:
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _audited(self, state: dict, model: nn.Module, source: str) -> OrderedDict:
        report = audit(state, model, source, **self.options, options='default_hooks.load_audit')
        kept = {*report.fresh, *(name for name, *_ in report.differences)}
        own = get_state_dict(model)
        audited = OrderedDict({**{name: own[name] for name in own.keys() & kept}, **report.weights})
        audited._metadata = own._metadata
        return audited
