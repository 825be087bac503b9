from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmspatialmamba.deploy import prepare_for_cpu


@HOOKS.register_module()
class PrepareForCPUHook(Hook):
    """Test with a copy of the model that :func:`mmspatialmamba.deploy.prepare_for_cpu` makes.

    Training and validation use the model itself. With ``EMAHook``, the averaged weights are prepared.
    """

    # After EMAHook, which swaps the averaged weights in.
    priority = 'VERY_LOW'

    def before_test_epoch(self, runner: Runner) -> None:
        """Put a prepared copy in the model's place.

        Raises:
            RuntimeError: If torch or the processor cannot run the copy.
            ValueError: If the model is not on the CPU, or not as it was built.
        """
        self._original = runner.model
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        runner.model = prepare_for_cpu(model.eval())
        runner.logger.info('testing with a copy of the model prepared for CPU inference')

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Put the model back."""
        runner.model = self._original
