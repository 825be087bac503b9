"""Train a small model with mmengine's Runner, in a new process for each line of stdin: trainer.py DESCRIPTOR.

A line holds the arguments of `train` as JSON. Processes are forked from one that has only imported modules, because
that takes much longer than the training: matplotlib and torchvision are among what mmengine's Runner imports. What is
being done is reported on the file descriptor, apart from what is printed, by data workers that outlive a kill too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import traceback

import matplotlib.pyplot  # noqa: F401
import numpy as np
import torch
import torchvision  # noqa: F401
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmspatialmamba.engine import checkpoint_hook  # noqa: F401
from mmspatialmamba.models import SpatialMamba


class Noise(torch.utils.data.Dataset):
    """Images that are noise, for training augmented with random numbers of Python, NumPy and torch."""

    metainfo = {'classes': ('a', 'b')}

    def __init__(self, augment: bool) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        image = torch.from_numpy(np.random.default_rng(index).normal(size=(3, 16, 16)).astype(np.float32))
        if self.augment:
            image = image.flip(-1) if random.random() < 0.5 else image
            image = image * np.float32(np.random.uniform(0.5, 1.5)) + 0.1 * torch.randn(3, 16, 16)
        return {'inputs': image, 'label': torch.tensor(index % 2)}


class Classifier(BaseModel):
    """SpatialMamba with drop path, dropout, and a buffer that makes a checkpoint take a while to write."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SpatialMamba(dict(embed_dims=8, depths=(1, 1)), out_indices=(1,), drop_path_rate=0.5)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 2))
        self.register_buffer('ballast', torch.zeros(1_000_000))

    def forward(self, inputs: torch.Tensor, label: torch.Tensor, mode: str = 'tensor'):
        logits = self.head(self.backbone(inputs)[0].mean((-2, -1)))
        loss = nn.functional.cross_entropy(logits, label)
        return {'loss': loss} if mode == 'loss' else [loss]


class Loss(BaseMetric):
    """The validation loss, computed by a metric that draws a random number too."""

    def process(self, data_batch: dict, data_samples: list[torch.Tensor]) -> None:
        self.results.append(data_samples[0].item())

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        torch.rand(1)
        return {'loss': sum(results) / len(results)}


def report(*words: object) -> None:
    """Tell the test something."""
    os.write(int(sys.argv[1]), f'{" ".join(map(str, words))}\n'.encode())


class Reporter(Hook):
    """Says what is being done: 'iteration', 'evaluation' or 'write'."""

    priority = 'LOWEST'

    def __init__(self, full_at: int | None) -> None:
        self.full_at = full_at

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if runner.iter == self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        report('iteration')

    def before_val(self, runner: Runner) -> None:
        report('evaluation')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        report('write')


def train(
    work_dir: str,
    by_epoch: bool,
    end: int,
    resume: bool = False,
    workers: int = 0,
    full_at: int | None = None,
    hook_by_epoch: bool | None = None,
    **hook: object,
) -> None:
    """Train for ``end`` epochs or iterations; from iteration ``full_at`` on, no file can exceed 100 kB."""

    def loader(sampler: str, training: bool) -> dict:
        return dict(
            dataset=Noise(training),
            batch_size=4,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type=sampler, shuffle=training),
            collate_fn=dict(type='default_collate'),
        )

    runner = Runner(
        Classifier(),
        work_dir,
        train_dataloader=loader('DefaultSampler' if by_epoch else 'InfiniteSampler', True),
        val_dataloader=loader('DefaultSampler', False),
        train_cfg=dict(by_epoch=True, max_epochs=end)
        if by_epoch
        else dict(by_epoch=False, max_iters=end, val_interval=3),
        val_cfg={},
        val_evaluator=Evaluator([Loss()]),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01), clip_grad=dict(max_norm=1.0)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10),
            dict(type='ReduceOnPlateauLR', monitor='loss', rule='less', factor=0.7, patience=1),
        ],
        default_hooks=dict(
            checkpoint=dict(
                type='ResumableCheckpointHook',
                by_epoch=by_epoch if hook_by_epoch is None else hook_by_epoch,
                **{'interval': 1, **hook},
            ),
            logger=dict(type='LoggerHook', interval=1000),
        ),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), Reporter(full_at)],
        log_level='WARNING',
        resume=resume,
        experiment_name='noise',
        randomness=dict(seed=0),
    )
    runner.train()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(**json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        report('started', pid)
        report('ended', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == '__main__':
    main()
