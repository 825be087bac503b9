"""What the trainings of test_distributed.py record; their configs import it."""

from __future__ import annotations

import json
from pathlib import Path

from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class GlobalLossHook(Hook):
    """Writes a line of ``losses.jsonl`` for each iteration: the mean loss of all processes, and their images."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        loss = outputs['loss'].detach().double()
        all_reduce(loss, 'mean')
        shares = all_gather_object([Path(sample.img_path).name for sample in data_batch['data_samples']])
        if is_main_process():
            with Path(runner.work_dir, 'losses.jsonl').open('a') as file:
                print(json.dumps([loss.item(), sorted(sum(shares, []))]), file=file)
