"""What mmengine and mmpretrain offer for training, with our backbone, against values computed by hand."""

import copy
from contextlib import nullcontext

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmspatialmamba.compat import TORCH
from mmspatialmamba.models import SpatialMamba

WRAPPERS = ['OptimWrapper', 'CPUAmpOptimWrapper']
LR = 0.1


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = SpatialMamba(dict(embed_dims=8, depths=(1, 1)), out_indices=1, drop_path_rate=0.0)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs, mode='tensor'):
        loss = (self.head(self.backbone(inputs)[0].mean((2, 3))) - 1).square().mean()
        return dict(loss=loss) if mode == 'loss' else loss


class Recorder(Hook):
    """Keeps the losses and learning rates of the iterations, and the states that they end with."""

    def __init__(self):
        self.losses, self.rates, self.states = [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append([group['lr'] for group in runner.optim_wrapper.optimizer.param_groups])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())
        self.states.append(copy.deepcopy(runner.model.state_dict()))


def noise(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


IMAGES = noise(*[(32, 32)] * 8)


@pytest.fixture
def train(tmp_path):
    """A function that trains an epoch without shuffling; it returns the model as it was, the runner and a Recorder."""

    def run(*hooks, images=IMAGES, batch_size=2, max_epochs=1, wrapper='OptimWrapper', **kwargs):
        torch.manual_seed(0)
        model, recorder = Model(), Recorder()
        initial = copy.deepcopy(model)
        optim_wrapper = dict(type=wrapper, optimizer=dict(type='SGD', lr=LR), **kwargs.pop('optim_wrapper', {}))
        runner = Runner(
            model,
            str(tmp_path),
            train_dataloader=dict(
                dataset=images,
                batch_size=batch_size,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
            optim_wrapper=optim_wrapper,
            default_hooks=dict(logger=None, checkpoint=kwargs.pop('checkpoint', None)),
            custom_hooks=[*hooks, recorder],
            experiment_name=f'{tmp_path.name}-{batch_size}-{len(DefaultScope._instance_dict)}',
            log_level='WARNING',
            **kwargs,
        )
        runner.train()
        return initial, runner, recorder

    return run


def batches(images=IMAGES, batch_size=2):
    return [torch.stack(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]


def test_precise_bn_gives_the_means_over_the_batches(train):
    import mmpretrain.engine  # noqa: F401

    _, runner, _ = train(dict(type='mmpretrain.PreciseBNHook', num_samples=6))
    reference = copy.deepcopy(runner.model).train()
    norms = {name: module for name, module in reference.named_modules() if isinstance(module, _BatchNorm)}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # averages over all batches
    with torch.no_grad():
        for batch in batches()[:3]:
            reference(batch)
    assert len(norms) == 6
    for name, norm in norms.items():
        actual = runner.model.get_submodule(name)
        torch.testing.assert_close(actual.running_mean, norm.running_mean)
        torch.testing.assert_close(actual.running_var, norm.running_var)
        assert actual.momentum == 0.1


def test_ema_averages_parameters_and_buffers(train):
    hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3, update_buffers=True)
    _, runner, recorder = train(hook)
    assert len(recorder.states) == 4
    expected = recorder.states[0]
    for state in recorder.states[1:]:
        expected = {
            name: value.lerp(state[name], 0.3) if value.is_floating_point() else value
            for name, value in expected.items()
        }
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module.state_dict()
    assert ema.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ema[name], value, msg=name)


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_gradients_accumulate_over_an_odd_number_of_iterations(train, wrapper):
    expected, runner, _ = train(images=IMAGES[:6], wrapper=wrapper, optim_wrapper=dict(accumulative_counts=2))
    optimizer = torch.optim.SGD(expected.parameters(), LR)
    autocast = torch.autocast('cpu', torch.bfloat16) if wrapper == 'CPUAmpOptimWrapper' else nullcontext()
    first, second, third = batches(IMAGES[:6])
    for together in ([first, second], [third]):
        for batch in together:
            with autocast:
                feature = expected.backbone(batch)[0]
            loss = (expected.head(feature.float().mean((2, 3))) - 1).square().mean()
            (loss / len(together)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), actual in zip(expected.state_dict().items(), runner.model.state_dict().values()):
        torch.testing.assert_close(actual, value, msg=name)


def test_learning_rates_are_scaled_to_the_batch(train):
    _, _, recorder = train(
        auto_scale_lr=dict(enable=True, base_batch_size=8),
        optim_wrapper=dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.5)))),
        param_scheduler=dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=2),
    )
    assert set(recorder.rates[0]) == {LR / 16, LR / 8}
    assert set(recorder.rates[-1]) == {LR / 8, LR / 4}


@pytest.mark.parametrize(('batch_size', 'warns'), [(2, False), (4, True)])
def test_another_batch_size_on_resuming_is_warned_of(train, tmp_path, batch_size, warns):
    settings = dict(
        checkpoint=dict(type='ResumableCheckpointHook', interval=1),
        param_scheduler=[dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)],
        max_epochs=2,
    )
    train(**settings)
    checkpoint = str(tmp_path / 'epoch_1.pth')
    _, _, recorder = train(**settings, batch_size=batch_size, load_from=checkpoint, resume=True)
    assert len(recorder.losses) == 8 // batch_size
    # Half of the cosine is over, as at the end of the epoch that was saved.
    assert recorder.rates[0] == [pytest.approx(LR / 2)]
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    message = 'The checkpoint has 4 iterations in 1 epochs, which would be 2 here'
    assert (message in log) is warns


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 9), reason='compiled code needs PyTorch 2.9')
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_compiled_training_gives_the_losses_of_eager_training(train, wrapper):
    images = noise((32, 32), (40, 24), (36, 52), (32, 32))
    losses = []
    for compile in (False, dict(backend='aot_eager')):
        torch._dynamo.reset()
        _, _, recorder = train(images=images, batch_size=1, wrapper=wrapper, cfg=dict(compile=compile))
        losses.append(recorder.losses)
    torch._dynamo.reset()
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5 if wrapper == 'OptimWrapper' else 1e-2)
    assert losses[0][-1] < 0.1 * losses[0][0]
