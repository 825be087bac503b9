import json

import pytest
from mmengine.registry import HOOKS

from mmspatialmamba.engine import MainProcessLoggerHook


class Runner:
    """What the hook asks of a runner after a test."""

    test_dataloader = (1, 2)

    class log_processor:
        @staticmethod
        def get_log_after_epoch(*args, **kwargs):
            return {'mIoU': 0.5}, 'mIoU: 0.5'

    class logger:
        @staticmethod
        def info(message):
            pass


@pytest.mark.parametrize(('rank', 'files'), [(0, 1), (1, 0)])
def test_main_process_alone_writes_the_metrics(tmp_path, monkeypatch, rank, files):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    runner = Runner()
    runner.log_dir = tmp_path
    hook = HOOKS.build({'type': 'MainProcessLoggerHook', 'interval': 5})
    assert isinstance(hook, MainProcessLoggerHook)
    hook.json_log_path = 'metrics.json'
    hook.after_test_epoch(runner, {'mIoU': 0.5})
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [{'mIoU': 0.5}] * files
