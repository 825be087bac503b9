"""PrepareForCPUHook in a runner's test, alone and with averaged weights."""

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmspatialmamba.deploy.cpu import _Stem
from mmspatialmamba.engine import PrepareForCPUHook
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import Stem


class Model(BaseModel):
    """Predicts the mean square of the features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = SpatialMamba(dict(embed_dims=8, depths=(1,)), out_indices=0)

    def forward(self, inputs, mode='tensor'):
        return [self.backbone(torch.stack(inputs))[0].square().mean()]


class Mean(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0].item())

    def compute_metrics(self, results):
        return {'mean': sum(results)}


def collate(images):
    return {'inputs': images}


def make_runner(folder, *hooks):
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    return Runner(
        model=Model(),
        work_dir=str(folder),
        test_dataloader=torch.utils.data.DataLoader(images, collate_fn=collate),
        test_evaluator=Evaluator(Mean()),
        test_cfg={},
        custom_hooks=[dict(type=hook) for hook in hooks],
        experiment_name=folder.name,
    )


@pytest.mark.parametrize('hooks', [(), (EMAHook,)], ids=['weights', 'averaged'])
def test_tests_with_a_prepared_copy(tmp_path, hooks):
    expected = make_runner(tmp_path / 'model', *hooks).test()
    runner = make_runner(tmp_path / 'prepared', *hooks, PrepareForCPUHook)
    model = runner.model
    assert runner.test()['mean'] == pytest.approx(expected['mean'], rel=1e-5)
    assert runner.model is model and type(model.backbone.stem) is Stem


class Doubled(Hook):
    """Doubles the averaged weights of the output norm."""

    priority = 'VERY_HIGH'

    def before_test_epoch(self, runner):
        averaged = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
        with torch.no_grad():
            for parameter in averaged.backbone.norm0.parameters():
                parameter.mul_(2)


def test_averaged_weights_are_prepared(tmp_path):
    expected = make_runner(tmp_path / 'model').test()
    runner = make_runner(tmp_path / 'prepared', EMAHook, Doubled, PrepareForCPUHook)
    stems = []
    runner.model.register_forward_pre_hook(lambda module, args: stems.append(type(module.backbone.stem)))
    assert runner.test()['mean'] == pytest.approx(4 * expected['mean'], rel=1e-4)
    assert stems == [_Stem] * 2
