from __future__ import annotations

import logging

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_from_http, load_from_local
from test_checkpoint.files import same
from test_checkpoint.test_refusals import Model

import mmspatialmamba  # noqa: F401

STOCK = {'': load_from_local, 'http://': load_from_http, 'https://': load_from_http}


@pytest.fixture(autouse=True)
def stock_loaders(monkeypatch):
    """The loaders that ``import mmspatialmamba`` leaves, whatever other tests have imported."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', {**CheckpointLoader._schemes, **STOCK})


@pytest.fixture
def lines():
    """What the current logger gets, as (level, message)."""
    records = []

    class Collector(logging.Handler):
        def emit(self, record):
            records.append((record.levelno, record.getMessage()))

    handler, known = Collector(), set(MMLogger._instance_dict)

    def attach(name):
        logger = MMLogger.get_instance(name)
        logger.addHandler(handler)
        return logger

    logger = attach(f'audit{len(known)}')
    yield records
    logger.removeHandler(handler)


class Images(list):
    metainfo = {'classes': ('a', 'b')}


class Trained(Model):
    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=super().forward(inputs).square().mean())


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A checkpoint of a training with mmengine's EMAHook, the model and its average."""
    folder = tmp_path_factory.mktemp('ema')
    runner = Runner(
        Trained(),
        str(folder),
        train_dataloader=dict(
            dataset=Images(dict(inputs=torch.rand(3, 32, 32)) for _ in range(4)),
            batch_size=2,
            sampler=dict(type='DefaultSampler'),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(load_audit=dict(type='LoadAuditHook')),
        custom_hooks=[dict(type='EMAHook', momentum=0.5, update_buffers=True)],
        experiment_name='ema',
    )
    runner.train()
    average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model
    assert not same(average.module.state_dict(), runner.model.state_dict())
    return str(folder / 'epoch_1.pth'), runner.model, average
