from __future__ import annotations

from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """Version of mmengine's ``LoggerHook`` whose main process alone writes the metrics of a test.

    In mmengine every process writes the same JSON file at the same time, which may mix their lines.
    """

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Log the metrics of a test, and write them to a JSON file in ``runner.log_dir``."""
        super().after_test_epoch(runner, metrics)
