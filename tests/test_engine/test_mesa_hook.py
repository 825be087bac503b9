import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from torch.nn.functional import log_softmax, softmax

from mmspatialmamba.models import SpatialMamba

CLASSES = 5
EPOCHS, EPOCH_LENGTH, BATCH = 4, 2, 4
MIXING = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return EPOCH_LENGTH * BATCH

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % CLASSES))


class Seeds(Hook):
    """Draws the same random numbers in an iteration, whether the training was interrupted before or not."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(runner.iter)
        np.random.seed(runner.iter)


class Recorder(Hook):
    """Keeps what an iteration started with, saw and ended with."""

    def __init__(self):
        self.seen, self.gradients, self.logs = [], [], []

    def before_train(self, runner):
        ema_model = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
        model = runner.model.module if hasattr(runner.model, 'module') else runner.model

        def keep_inputs(module, args, kwargs):
            if kwargs['mode'] == 'loss':
                scores = torch.stack([sample.gt_score for sample in kwargs['data_samples']])
                state = copy.deepcopy((model, ema_model)), kwargs['inputs'].clone(), scores, torch.get_rng_state()
                self.seen.append(state)

        def keep_gradients(optimizer, args, kwargs):
            self.gradients.append([p.grad.clone() for p in model.parameters()])

        self.handles = [
            model.register_forward_pre_hook(keep_inputs, with_kwargs=True),
            runner.optim_wrapper.optimizer.register_step_pre_hook(keep_gradients),
        ]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.logs.append({name: value.item() for name, value in outputs.items()})


def make_runner(work_dir, *hooks, mixing=MIXING, optim_wrapper=None, norm_eval=False, drop_path_rate=0.2, **kwargs):
    loader = dict(dataset=Images(), num_workers=0, collate_fn=dict(type='default_collate'))
    settings = dict(
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(num_classes=CLASSES, mean=[127.0] * 3, std=[60.0] * 3, to_onehot=True),
            backbone=dict(
                type='SpatialMamba',
                arch=dict(embed_dims=8, depths=(1, 1, 1, 1)),
                out_indices=(3,),
                drop_path_rate=drop_path_rate,
                norm_eval=norm_eval,
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=CLASSES,
                in_channels=64,
                init_cfg=dict(type='Normal', layer='Linear', std=0.1),
                loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
            ),
            train_cfg=mixing,
        ),
        work_dir=str(work_dir),
        train_dataloader=dict(batch_size=BATCH, sampler=dict(type='DefaultSampler', shuffle=True), **loader),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS, val_begin=EPOCHS + 1),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[
            Seeds(),
            dict(type='EMAHook', momentum=0.1, update_buffers=True, priority='ABOVE_NORMAL'),
            dict(type='MESAHook', loss_weight=1.5),
            *hooks,
        ],
        default_hooks=dict(logger=None, checkpoint=None),
        log_level='WARNING',
        experiment_name=f'{Path(work_dir).parent.name}-{Path(work_dir).name}-{os.getpid()}-{len(os.listdir(work_dir))}',
        randomness=dict(seed=0),
        default_scope='mmpretrain',
    )
    settings.update(kwargs)
    init_default_scope('mmpretrain')
    import mmpretrain.models  # noqa: F401

    return Runner(**settings)


def ema_model(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module


def losses_by_hand(models, inputs, scores, rng_state, autocast, with_mesa):
    """Both losses of a batch of mixed images and labels, as the paper writes them; the student's gradient remains."""
    student, teacher = models

    def logits(model):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            (feature,) = model.neck(model.backbone(inputs))
        return model.head.fc(feature.float())

    torch.set_rng_state(rng_state)
    output = logits(student.train())
    smooth = 0.9 * scores + 0.1 / CLASSES
    loss = -(smooth * log_softmax(output, 1)).sum(1).mean()
    if not with_mesa:
        return loss, None
    with torch.no_grad():
        targets = softmax(logits(teacher.eval()), 1)
    return loss, -1.5 * (targets * log_softmax(output, 1)).sum(1).mean()


@pytest.mark.slow
@pytest.mark.parametrize('accumulative_counts', [1, 2])
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
def test_losses_and_gradients_are_those_computed_by_hand(tmp_path, amp, accumulative_counts):
    recorder = Recorder()
    wrapper = dict(
        type='CPUAmpOptimWrapper' if amp else 'OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1),
        accumulative_counts=accumulative_counts,
    )
    runner = make_runner(tmp_path, recorder, optim_wrapper=wrapper)
    runner.train()
    assert len(recorder.logs) == EPOCHS * EPOCH_LENGTH
    mixed = 0
    gradient = 0
    for i, (seen, log) in enumerate(zip(recorder.seen, recorder.logs)):
        models = seen[0]
        cls_loss, mesa_loss = losses_by_hand(*seen, amp, with_mesa=i >= EPOCH_LENGTH)
        total = cls_loss if mesa_loss is None else cls_loss + mesa_loss
        gradient += torch.cat([g.flatten() for g in torch.autograd.grad(total, list(models[0].parameters()))])
        if mesa_loss is None:
            assert set(log) == {'loss'}
        else:
            assert set(log) == {'loss', 'cls_loss', 'mesa_loss'}
            assert log['cls_loss'] == pytest.approx(cls_loss.item(), rel=1e-5)
            assert log['mesa_loss'] == pytest.approx(mesa_loss.item(), rel=1e-5)
        assert log['loss'] == pytest.approx(total.item(), rel=1e-5)
        if (i + 1) % accumulative_counts == 0:
            actual = torch.cat([g.flatten() for g in recorder.gradients[i // accumulative_counts]])
            gradient /= accumulative_counts
            assert (actual - gradient).norm() < 1e-4 * gradient.norm()
            gradient = 0
        mixed += int((seen[2].max(dim=1).values < 1).any())
    assert mixed > EPOCH_LENGTH


def test_ema_is_upstreams_but_for_its_start_and_mesa_leaves_it_alone(tmp_path):
    """timm's average starts as a copy of the untrained model, mmengine's as one of the model after a step."""
    recorder = Recorder()
    runner = make_runner(tmp_path, recorder)
    runner.train()
    untrained, *students = [seen[0][0].state_dict() for seen in recorder.seen] + [runner.model.state_dict()]
    actual = ema_model(runner).state_dict()
    assert actual.keys() == untrained.keys() and any('running_var' in name for name in actual)
    for name, value in actual.items():
        if not value.is_floating_point():
            continue
        timm = untrained[name].double()
        for student in students:
            timm = 0.9 * timm + 0.1 * student[name].double()
        start = 0.9 ** len(students) * (students[0][name].double() - untrained[name].double())
        torch.testing.assert_close(value.double(), timm + start, rtol=1e-5, atol=1e-6)


class Contexts:
    """Under which circumstances the backbones of student and teacher run."""

    def __init__(self, monkeypatch):
        self.calls = []
        forward = SpatialMamba.forward

        def spy(module, x):
            autocast = torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')
            self.calls.append((module.training, torch.is_grad_enabled(), autocast))
            return forward(module, x)

        monkeypatch.setattr(SpatialMamba, 'forward', spy)


def test_teacher_runs_in_evaluation_mode_without_gradient_under_the_same_autocast(tmp_path, monkeypatch):
    contexts = Contexts(monkeypatch)
    runner = make_runner(
        tmp_path, optim_wrapper=dict(type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1), loss_scale=None)
    )
    runner.train()
    student, teacher = (True, True, torch.bfloat16), (False, False, torch.bfloat16)
    assert contexts.calls == [student] * EPOCH_LENGTH + [student, teacher] * (EPOCHS - 1) * EPOCH_LENGTH


def test_validates_the_ema_model_and_adds_nothing_there(tmp_path, monkeypatch):
    contexts = Contexts(monkeypatch)
    swapped = []

    class Compare(Hook):
        priority = 'LOWEST'

        def before_val_epoch(self, runner):
            swapped.append(torch.equal(runner.model.head.fc.weight, self.teacher))

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.teacher = ema_model(runner).head.fc.weight.clone()

    loader = dict(batch_size=BATCH, dataset=Images(), num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    runner = make_runner(
        tmp_path,
        Compare(),
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        val_dataloader=dict(collate_fn=dict(type='default_collate'), **loader),
        val_cfg={},
        val_evaluator=dict(type='Accuracy'),
    )
    runner.train()
    assert swapped == [True, True]
    validation = [(False, False, False)] * EPOCH_LENGTH
    alone, with_teacher = [(True, True, False)], [(True, True, False), (False, False, False)]
    assert contexts.calls == alone + with_teacher + validation + 2 * with_teacher + validation


def states(runner):
    return {
        **{f'model.{name}': value for name, value in runner.model.state_dict().items()},
        **{f'ema.{name}': value for name, value in ema_model(runner).state_dict().items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize('stop', [1, 2], ids=['before-the-start', 'past-the-start'])
def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path, stop):
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'parts').mkdir()
    checkpoints = dict(logger=None, checkpoint=dict(type='CheckpointHook', interval=1))
    whole = Recorder()
    runner = make_runner(tmp_path / 'whole', whole)
    runner.train()
    expected = states(runner)

    class Interrupt(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path / 'parts', Interrupt(), default_hooks=checkpoints).train()
    rest = Recorder()
    runner = make_runner(tmp_path / 'parts', rest, default_hooks=checkpoints, resume=True)
    runner.train()
    assert rest.logs == whole.logs[stop * EPOCH_LENGTH :]
    actual = states(runner)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def train_without_randomness(work_dir, world, **kwargs):
    """Train with the same batches whatever the number of processes; return losses, weights and averaged weights."""
    loader = dict(
        batch_size=BATCH // world,
        dataset=Images(),
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True, seed=0),
        collate_fn=dict(type='default_collate'),
    )
    recorder = Recorder()
    runner = make_runner(
        work_dir, recorder, mixing=None, norm_eval=True, drop_path_rate=0.0, train_dataloader=loader, **kwargs
    )
    runner.train()
    losses = torch.tensor([[log.get('cls_loss', log['loss']), log.get('mesa_loss', 0.0)] for log in recorder.logs])
    return losses, {name.replace('model.module.', 'model.'): value for name, value in states(runner).items()}


def train_as_one_of_two(work_dir):
    """What each process of the test below runs."""
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    losses, state = train_without_randomness(work_dir, 2, launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    torch.distributed.all_reduce(losses)
    if torch.distributed.get_rank() == 0:
        torch.save((losses / 2, state), Path(work_dir, 'result.pt'))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    losses, state = train_without_randomness(tmp_path / 'one', 1)
    assert (losses[EPOCH_LENGTH:, 1] > 0).all() and (losses[:EPOCH_LENGTH, 1] == 0).all()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    environment['PYTHONPATH'] = str(Path(__file__).parents[1])
    code = f'from test_engine.test_mesa_hook import train_as_one_of_two as train; train({str(tmp_path / "two")!r})'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code],
            env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(errors)
    distributed_losses, distributed_state = torch.load(tmp_path / 'two' / 'result.pt')
    torch.testing.assert_close(distributed_losses, losses, rtol=1e-4, atol=1e-5)
    assert distributed_state.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(distributed_state[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(loss_weight=-1.0), 'loss_weight must be at least 0, but is -1.0'),
        (dict(loss_weight=1.0, begin=75), 'begin is a share of the training, at least 0 and below 1, but is 75'),
    ],
    ids=['weight', 'begin'],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build(dict(type='MESAHook', **settings))


def test_a_missing_ema_model_is_an_error(tmp_path):
    runner = make_runner(tmp_path, custom_hooks=[dict(type='MESAHook', loss_weight=1.0)])
    with pytest.raises(ValueError, match="MESAHook: the EMA model is missing: add dict.type='EMAHook'"):
        runner.train()


def test_the_model_is_left_as_it_was(tmp_path):
    runner = make_runner(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=1))
    runner.train()
    assert not runner.model._forward_hooks and not runner.model.head._forward_hooks
