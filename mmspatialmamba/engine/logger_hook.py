from __future__ import annotations

from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """mmengine's ``LoggerHook``, of which the main process alone writes the metrics of a test.

    In mmengine every process writes the same JSON file, at the same time, and the file may end up as a mixture.
    """

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Log the metrics and write them to a JSON file in ``runner.log_dir``.

        Args:
            runner (Runner): The runner of the test.
            metrics (dict[str, float], optional): Evaluation results. Defaults to None.
        """
        super().after_test_epoch(runner, metrics)
