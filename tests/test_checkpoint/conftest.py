from __future__ import annotations

import pytest
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_from_http, load_from_local

import mmspatialmamba  # noqa: F401

STOCK = {'': load_from_local, 'http://': load_from_http, 'https://': load_from_http}


@pytest.fixture(autouse=True)
def stock_loaders(monkeypatch):
    """The loaders that ``import mmspatialmamba`` leaves, whatever other tests have imported."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', {**CheckpointLoader._schemes, **STOCK})
