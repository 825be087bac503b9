"""Training on several processes, of one machine and of two."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_workers import ARCH, OPTIONS, SUBSETS, Detector, share_parameters, train_under_ddp
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from small_runs import TOOLS, dist_train, run_script

CONFIGS = TOOLS.parent / 'configs'
STEPS = 50
BATCH = 8
IMAGES = 40
CLASSES = 4
BACKBONE = dict(type='SpatialMamba', arch=ARCH, drop_path_rate=0.0, norm_eval=True)
NORMALISE = dict(mean=[127.5] * 3, std=[127.5] * 3)
CLASSIFIER = dict(
    default_scope='mmpretrain',
    model=dict(
        type='ImageClassifier',
        data_preprocessor=dict(num_classes=CLASSES, **NORMALISE),
        backbone=dict(**BACKBONE, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=64),
    ),
    dataset=dict(
        type='CustomDataset',
        data_prefix='images',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
    sampler='DefaultSampler',
    train_cfg=dict(by_epoch=True, max_epochs=STEPS * BATCH // IMAGES),
)
SEGMENTOR = dict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), **NORMALISE),
        backbone=BACKBONE,
        decode_head=dict(
            type='UPerHead',
            in_channels=[8, 16, 32, 64],
            in_index=[0, 1, 2, 3],
            pool_scales=(1, 2),
            channels=16,
            dropout_ratio=0.0,
            num_classes=CLASSES,
            norm_cfg=dict(type='GN', num_groups=4),
            # A ReLU whose input is within rounding of 0 may have another gradient in another run.
            act_cfg=dict(type='GELU'),
            align_corners=False,
        ),
    ),
    dataset=dict(
        type='BaseSegDataset',
        data_prefix=dict(img_path='pixels', seg_map_path='pixels'),
        seg_map_suffix='_classes.png',
        metainfo=dict(classes=tuple('abcd'), palette=[(0, 0, 0)] * CLASSES),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    ),
    sampler='InfiniteSampler',
    train_cfg=dict(by_epoch=False, max_iters=STEPS),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of four classes, and images with a class for each patch of 4 x 4 pixels."""
    folder = tmp_path_factory.mktemp('distributed')
    generator = np.random.default_rng(0)

    def write(classes: np.ndarray, name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 96, (32, 32, 3), dtype=np.uint8)
        Image.fromarray((48 * classes[..., None] + noise).astype(np.uint8)).save(folder / name)

    for index in range(IMAGES):
        number = index % CLASSES
        write(np.full((32, 32), number), f'images/class{number}/{index}.png')
        classes = generator.integers(0, CLASSES, (8, 8), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        write(classes, f'pixels/{index}.jpg')
        Image.fromarray(classes).save(folder / 'pixels' / f'{index}_classes.png')
    return folder


def write_config(folder: Path, name: str, settings: dict) -> Path:
    """Write a config of a training of ``STEPS`` iterations that records its losses."""
    settings = dict(settings)
    dataset = dict(data_root=str(folder), **settings.pop('dataset'))
    settings.update(
        custom_imports=dict(imports=['mmspatialmamba', 'global_loss_hook'], allow_failed_imports=False),
        custom_hooks=[dict(type='GlobalLossHook')],
        train_dataloader=dict(
            batch_size=BATCH,
            num_workers=0,
            persistent_workers=False,
            pin_memory=False,
            sampler=dict(type=settings.pop('sampler'), shuffle=True),
            dataset=dataset,
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05)),
        default_hooks=dict(checkpoint=settings.pop('checkpoint', None), logger=dict(type='LoggerHook', interval=10)),
        randomness=dict(seed=0),
    )
    path = folder / f'{name}.py'
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in settings.items()))
    return path


def with_hook() -> dict[str, str]:
    """The environment in which global_loss_hook is found."""
    return {'PYTHONPATH': os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))}


def read_losses(work_dir: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Read the loss of each step, and the images that it is of."""
    lines = [json.loads(line) for line in (work_dir / 'losses.jsonl').open()]
    return torch.tensor([loss for loss, _ in lines], dtype=torch.float64), [images for _, images in lines]


TRAININGS = {'classifier': CLASSIFIER, 'segmentor': SEGMENTOR}


@pytest.fixture(scope='module')
def on_one_process(folder):
    """A function that returns a config, and the losses and images of each step of its training on one process."""

    @functools.cache
    def train(name: str) -> tuple[Path, torch.Tensor, list[list[str]]]:
        config, work_dir = write_config(folder, name, TRAININGS[name]), folder / f'{name} on one process'
        result = run_script(
            *(sys.executable, TOOLS / 'train.py', config, '--work-dir', work_dir), cwd=folder, **with_hook()
        )
        assert result.returncode == 0, result.stderr
        losses, images = read_losses(work_dir)
        assert len(losses) == STEPS
        assert losses[-5:].mean() < 0.9 * losses[:5].mean()
        return config, losses, images

    return train


def largest_difference(losses: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of the losses of a step, relative to the expected one."""
    return ((losses - expected).abs() / expected).max().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'nodes', 'processes'), [('classifier', 1, 2), ('classifier', 2, 2), ('segmentor', 2, 2)]
)
def test_losses_equal_those_of_one_process(on_one_process, name, nodes, processes, record_property):
    config, expected, expected_images = on_one_process(name)
    work_dir = config.parent / f'{config.stem} on {nodes} x {processes}'
    option = f'train_dataloader.batch_size={BATCH // (nodes * processes)}'
    out = dist_train(config, work_dir, '--cfg-options', option, nodes=nodes, processes=processes, **with_hook())
    assert f'{nodes * processes} CPU processes over gloo' in out
    losses, images = read_losses(work_dir)
    assert images == expected_images
    record_property('largest relative difference', largest_difference(losses, expected))
    assert largest_difference(losses, expected) < 1e-4


@pytest.mark.slow
def test_resumes_on_another_number_of_processes(on_one_process, tmp_path):
    plain, expected, expected_images = on_one_process('classifier')
    checkpoint = dict(type='ResumableCheckpointHook', interval=2)
    config = write_config(plain.parent, 'resumable', {**CLASSIFIER, 'checkpoint': checkpoint})
    option = ('--cfg-options', f'train_dataloader.batch_size={BATCH // 2}')
    command = (sys.executable, TOOLS / 'train.py', config, '--work-dir', tmp_path / 'one')
    result = run_script(*command, cwd=config.parent, **with_hook())
    assert result.returncode == 0, result.stderr
    out = dist_train(config, tmp_path / 'two', '--resume', tmp_path / 'one' / 'epoch_2.pth', *option, **with_hook())
    assert 'The checkpoint is of 1 processes, and these are 2' in out
    command = (*command[:-1], tmp_path / 'one again', '--resume', tmp_path / 'two' / 'epoch_6.pth')
    result = run_script(*command, cwd=config.parent, **with_hook())
    assert result.returncode == 0, result.stderr
    assert 'The checkpoint is of 2 processes, and these are 1' in result.stdout
    for name, epochs in (('two', 2), ('one again', 6)):
        losses, images = read_losses(tmp_path / name)
        assert images == expected_images[epochs * IMAGES // BATCH :]
        assert largest_difference(losses, expected[epochs * IMAGES // BATCH :]) < 1e-4
    assert 'which would be' not in out + result.stdout


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('out_indices', SUBSETS, ids=str)
def test_every_parameter_that_is_trained_gets_a_gradient(out_indices, options):
    model = Detector(out_indices=out_indices, **options).train()
    model(torch.randn(2, 3, 32, 32)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


@pytest.mark.slow
def test_ddp_needs_no_find_unused_parameters(tmp_path):
    torch.multiprocessing.spawn(train_under_ddp, (str(tmp_path),), nprocs=2)


FSDP_CONFIG = CONFIGS / 'detection' / 'mask-rcnn_spatialmamba-base_fpn_fsdp-1x_coco.py'


def test_fsdp_config_differs_in_what_fsdp_needs_only():
    cfg = Config.fromfile(FSDP_CONFIG)
    plain = Config.fromfile(FSDP_CONFIG.with_name('mask-rcnn_spatialmamba-base_fpn_1x_coco.py'))
    assert cfg.pop('runner_type') == 'FlexibleRunner'
    assert cfg.pop('strategy').type == 'ResumableFSDPStrategy'
    for name in ('load_audit', 'timer', 'param_scheduler', 'sampler_seed'):
        del plain.default_hooks[name]
    for hook in plain.default_hooks.values():
        hook.pop('_scope_', None)
    assert cfg.to_dict() == plain.to_dict()
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert not {'clip_grad', 'flat_decay_mult'} & {*cfg.optim_wrapper, *cfg.optim_wrapper.paramwise_cfg}


@pytest.mark.slow
def test_fsdp_trains_like_one_process_and_resumes(on_one_process):
    plain, expected, expected_images = on_one_process('classifier')
    folder, cfg = plain.parent, Config.fromfile(FSDP_CONFIG)
    config = write_config(
        folder,
        'fsdp',
        {
            **CLASSIFIER,
            'env_cfg': {},
            'runner_type': cfg.runner_type,
            'strategy': cfg.strategy.to_dict(),
            'checkpoint': {**cfg.default_hooks.checkpoint, 'interval': 5},
        },
    )
    option = ('--cfg-options', f'train_dataloader.batch_size={BATCH // 2}')
    out = dist_train(config, folder / 'fsdp', *option, **with_hook())
    assert 'strategy.model_wrapper.device_id=cpu' in out
    losses, images = read_losses(folder / 'fsdp')
    assert images == expected_images
    assert largest_difference(losses, expected) < 1e-4

    checkpoint = folder / 'fsdp' / 'epoch_5.pth'
    dist_train(config, folder / 'fsdp resumed', '--resume', checkpoint, *option, **with_hook())
    resumed, images = read_losses(folder / 'fsdp resumed')
    assert images == expected_images[STEPS // 2 :]
    torch.testing.assert_close(resumed, losses[STEPS // 2 :], rtol=0, atol=0)

    init_default_scope('mmpretrain')
    saved = torch.load(checkpoint, weights_only=True)
    MODELS.build(Config.fromfile(plain, import_custom_modules=False).model).load_state_dict(saved['state_dict'])


@pytest.mark.slow
def test_fsdp_shares_the_parameters_of_each_block(tmp_path):
    wrapper = Config.fromfile(FSDP_CONFIG).strategy.model_wrapper.to_dict()
    torch.multiprocessing.spawn(share_parameters, (str(tmp_path), wrapper), nprocs=2)
