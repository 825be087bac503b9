from __future__ import annotations

import logging

import pytest
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_http, load_from_local

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
