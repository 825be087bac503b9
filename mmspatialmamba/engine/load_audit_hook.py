from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmspatialmamba.checkpoint import audit_model, to_mmengine
from mmspatialmamba.checkpoint.reader import pop_note


def _unwrap(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@HOOKS.register_module()
class LoadAuditHook(Hook):
    """Audits every checkpoint that the runner loads, by ``load_from``, ``resume`` or for a test, before it is loaded.

    One line is logged if all went well, else a table, and training stops if anything that should come from the file
    does not. A classifier's checkpoint starts the backbone of a detector or segmentor; heads, neck and output norms
    then keep their initial values, which the line says.

    Args:
        max_missing (int): How many tensors may be missing from the file, of another shape or, in the backbone, left
            over. Defaults to 0.
        fresh (Sequence[str]): Names of modules and parameters that keep their initial values where the file has none of
            that shape, such as 'head.fc' for another class count. Defaults to ().
        allow_nan (bool): Whether NaN and infinite weights are taken. Defaults to False.
        inflate_stem (bool): Whether the first convolution is fitted to another number of image channels than the
            file's: one gets the sum of the file's kernels, more get them in turn, scaled so that the activations keep
            their size. Defaults to False.
    """

    # Before EMAHook and others that use the checkpoint.
    priority = 'VERY_HIGH'

    def __init__(
        self,
        max_missing: int = 0,
        fresh: Sequence[str] = (),
        allow_nan: bool = False,
        inflate_stem: bool = False,
    ) -> None:
        self.max_missing = max_missing
        self.fresh = (fresh,) if isinstance(fresh, str) else tuple(fresh)
        self.allow_nan = allow_nan
        self.inflate_stem = inflate_stem

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Audit a checkpoint, and leave in it what the model is to load.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What was read. Its state dict gets our names, and the model's own values for what starts
                fresh.

        Raises:
            CheckpointError: If the checkpoint does not hold what it should.
        """
        model = _unwrap(runner.model)
        converted = to_mmengine(checkpoint)
        if converted is not None and converted is not checkpoint:
            checkpoint.clear()
            checkpoint.update(converted)
        state = checkpoint.get('state_dict', checkpoint)
        source = pop_note(state) or 'the checkpoint'
        checkpoint['state_dict'] = self._audited(state, model, source)
        if 'ema_state_dict' in checkpoint and runner._resume:
            averaged = {k[len('module.') :]: v for k, v in checkpoint['ema_state_dict'].items() if k != 'steps'}
            self._audited(averaged, model, f'{source} (ema_state_dict)')

    def _audited(self, state: dict, model: nn.Module, source: str) -> OrderedDict:
        report = audit_model(state, model, source, self.fresh, self.inflate_stem)
        report.check(self.max_missing, self.allow_nan, 'default_hooks.load_audit')
        audited = OrderedDict({**model.state_dict(), **report.weights})
        if hasattr(state, '_metadata'):
            audited._metadata = state._metadata
        return audited
