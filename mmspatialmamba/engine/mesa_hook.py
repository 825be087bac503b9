from __future__ import annotations

from functools import partial

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F


@HOOKS.register_module()
class MESAHook(Hook):
    """Self-distillation of a classifier from the moving average of its own weights (MESA).

    After a share of the training the loss gets a second term: ``loss_weight`` times the cross-entropy between the
    model's logits and the softmax of the EMA model's logits. The EMA model is that of the ``EMAHook`` beside this hook.
    It sees the same images, after mixup and cutmix, in evaluation mode, without gradient and under the same autocast.

    The log names the second term ``mesa_loss``, the head's loss ``cls_loss`` and their sum ``loss``. The hook has no
    state: ``EMAHook`` saves the EMA weights, and the iteration tells whether the second term has begun.

    Args:
        loss_weight (float): Weight of the second term, at least 0.
        begin (float): Share of the training without it, at least 0 and below 1. Defaults to 0.25: of 300 epochs, number
            75, counted from 0, is the first with it.

    Raises:
        ValueError: If ``loss_weight`` or ``begin`` is out of its range.
    """

    def __init__(self, loss_weight: float, begin: float = 0.25) -> None:
        if loss_weight < 0:
            raise ValueError(f'MESAHook: loss_weight must be at least 0, but is {loss_weight}')
        if not 0 <= begin < 1:
            raise ValueError(f'MESAHook: begin is a share of the training, at least 0 and below 1, but is {begin}')
        self.loss_weight = loss_weight
        self.begin = begin
        self._logits: torch.Tensor | None = None
        self._handles: list = []

    def before_train(self, runner: Runner) -> None:
        """Find the model, whose ``head`` returns logits of shape (batch, classes), and its moving average.

        Raises:
            ValueError: If the runner has no ``EMAHook``.
            TypeError: If the model has no head.
        """
        ema_hook = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if ema_hook is None:
            raise ValueError(
                "MESAHook: the EMA model is missing: add dict(type='EMAHook', momentum=1e-4, update_buffers=True) "
                'to custom_hooks'
            )
        self.model = ema_hook.src_model
        if not isinstance(getattr(self.model, 'head', None), nn.Module):
            raise TypeError(f'MESAHook: the model must be a classifier with a head, but is {type(self.model).__name__}')
        self.ema_model = ema_hook.ema_model.module.eval()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Add the second term to the model's loss from the share ``begin`` of the training on."""
        if self._handles or runner.iter < self.begin * runner.max_iters:
            return
        runner.logger.info(f'MESA, weight {self.loss_weight}, from iteration {runner.iter} on')
        self._handles = [
            self.model.head.register_forward_hook(self._keep_logits),
            self.model.register_forward_hook(partial(self._add_loss, runner.optim_wrapper), with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Remove the second term."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_logits(self, head: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        self._logits = logits

    def _add_loss(
        self, optim_wrapper: OptimWrapper, model: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> object:
        logits, self._logits = self._logits, None
        if kwargs.get('mode') != 'loss':
            return output
        with torch.no_grad(), optim_wrapper.optim_context(self.ema_model):
            targets = self.ema_model(kwargs['inputs'], mode='tensor').float().softmax(dim=1)
        # mmengine logs the sum of all losses as `loss`, unless one of them is called that itself.
        losses = {'cls_loss' if name == 'loss' else name: loss for name, loss in output.items()}
        losses['mesa_loss'] = self.loss_weight * F.cross_entropy(logits.float(), targets)
        return losses
