"""Every published config against the published recipe, setting by setting.

``python tests/test_recipes.py`` writes the tables of docs/recipes.md anew.
"""

import json
import math
import re
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import ParamSchedulerHook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from test_configs import ARCHS, FILES, build_model, load

from mmspatialmamba.models.utils import from_upstream

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'recipes.md'
MARK = '<!-- written by tests/test_recipes.py -->\n'
SECTIONS = {
    'ImageNet-1K': [f'spatialmamba-{arch}_8xb128_in1k' for arch in ARCHS],
    'Mask R-CNN, COCO, 1x': [f'mask-rcnn_spatialmamba-{arch}_fpn_1x_coco' for arch in ARCHS],
    'Mask R-CNN, COCO, 3x': [f'mask-rcnn_spatialmamba-{arch}_fpn_ms-crop-3x_coco' for arch in ARCHS[:2]],
    'UPerNet, ADE20K': [f'spatialmamba-{arch}_upernet_8xb2-160k_ade20k-512x512' for arch in ARCHS],
}
STEMS = {stem: section for section, stems in SECTIONS.items() for stem in stems}
DEVICES = 8
# Iterations of an epoch at 16 images: COCO's 117,266 training images with objects. At 1024: ImageNet's 1,281,167.
EPOCH_LENGTH = {'mmpretrain': 1_281_167 // 1024, 'mmdet': math.ceil(117_266 / 16), 'mmseg': 1}
BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')

MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]
LONG_SIDES = [(side, 1333) for side in range(480, 801, 32)]
LOAD = dict(type='LoadImageFromFile')
LOAD_MASKS = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
FLIP = dict(type='RandomFlip', prob=0.5)
RESIZE = dict(type='RandomChoiceResize', scales=LONG_SIDES, keep_ratio=True)
TRAIN_PIPELINES = {
    'ImageNet-1K': [
        LOAD,
        dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(
            type='RandAugment',
            policies='timm_increasing',
            num_policies=2,
            total_level=10,
            magnitude_level=9,
            magnitude_std=0.5,
            hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
        ),
        dict(
            type='RandomErasing',
            erase_prob=0.25,
            mode='rand',
            min_area_ratio=0.02,
            max_area_ratio=1 / 3,
            fill_color=MEAN[::-1],
            fill_std=STD[::-1],
        ),
        dict(type='PackInputs'),
    ],
    'Mask R-CNN, COCO, 1x': [
        LOAD,
        LOAD_MASKS,
        dict(type='Resize', scale=(1333, 800), keep_ratio=True),
        FLIP,
        dict(type='PackDetInputs'),
    ],
    'Mask R-CNN, COCO, 3x': [
        LOAD,
        LOAD_MASKS,
        FLIP,
        dict(
            type='RandomChoice',
            transforms=[
                [RESIZE],
                [
                    dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                    RESIZE,
                ],
            ],
        ),
        dict(type='PackDetInputs'),
    ],
    'UPerNet, ADE20K': [
        LOAD,
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
        FLIP,
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ],
}
# The first transforms of a test; what follows loads annotations and packs.
TEST_PIPELINES = {
    'ImageNet-1K': [
        LOAD,
        dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=224),
    ],
    'Mask R-CNN, COCO, 1x': [LOAD, dict(type='Resize', scale=(1333, 800), keep_ratio=True)],
    'Mask R-CNN, COCO, 3x': [LOAD, dict(type='Resize', scale=(1333, 800), keep_ratio=True)],
    'UPerNet, ADE20K': [LOAD, dict(type='Resize', scale=(2048, 512), keep_ratio=True)],
}
# The operations of rand-m9-mstd0.5-inc1, with their strengths at levels 0 and 10.
RAND_AUGMENT = [
    ('AutoContrast', None),
    ('Equalize', None),
    ('Invert', None),
    ('Rotate', (0, 30)),
    ('Posterize', (4, 0)),
    ('Solarize', (256, 0)),
    ('SolarizeAdd', (0, 110)),
    ('ColorTransform', (0, 0.9)),
    ('Contrast', (0, 0.9)),
    ('Brightness', (0, 0.9)),
    ('Sharpness', (0, 0.9)),
    ('Shear', (0, 0.3)),
    ('Shear', (0, 0.3)),
    ('Translate', (0, 0.45)),
    ('Translate', (0, 0.45)),
]
IMAGES_PER_DEVICE = {'mmpretrain': 128, 'mmdet': 2, 'mmseg': 2}
OPTIMIZERS = {
    'mmpretrain': dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    'mmdet': dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    'mmseg': dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
}
DROP_PATH = {'tiny': 0.2, 'small': 0.3, 'base': 0.5}
MESA = {'tiny': 1.0, 'small': 1.5, 'base': 2.0}

every_config = pytest.mark.parametrize('stem', STEMS)
every_model = pytest.mark.parametrize(
    'stem', [pytest.param(stem, marks=() if '-tiny' in stem else pytest.mark.slow) for stem in STEMS]
)


def arch_of(stem):
    return re.search('-(tiny|small|base)', stem)[1]


@cache
def config(stem):
    return load(FILES[stem])


def plain(value):
    """A part of a config without what the libraries add when it is inherited by scope."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ('_scope_', 'backend_args')}
    return [plain(v) for v in value] if isinstance(value, list) else value


def build(stem):
    """A config's model, without memory, and its optimizer."""
    cfg = load(FILES[stem])
    with torch.device('meta'):
        model = build_model(cfg)
    settings = dict(cfg.optim_wrapper, type='OptimWrapper')
    settings.pop('loss_scale', None)
    return SimpleNamespace(cfg=cfg, model=model, optimizer=build_optim_wrapper(model, settings).optimizer)


def upstream_parameters(keys, cfg, arch):
    """Upstream's name, ours and the shape of every parameter that upstream's checkpoint lists."""
    kind = 'classifier' if cfg.default_scope == 'mmpretrain' else 'backbone'
    last_stage = 3 if kind == 'classifier' else None
    for name, shape in keys[f'{arch}_{kind}']:
        if name.startswith('head.'):
            yield name, name.replace('head.', 'head.fc.'), shape
        elif not name.endswith(BUFFERS):
            yield name, f'backbone.{from_upstream(name, last_stage)}', shape


def settings_by_name(built):
    """Learning rate and weight decay of each parameter, as the optimizer has them."""
    groups = {id(p): group for group in built.optimizer.param_groups for p in group['params']}
    return {name: (groups[id(p)]['lr'], groups[id(p)]['weight_decay']) for name, p in built.model.named_parameters()}


@every_model
def test_learning_rate_and_weight_decay_by_upstream_name(stem, keys):
    built = build(stem)
    scope = built.cfg.default_scope
    recipe = OPTIMIZERS[scope]
    expected = {}
    for name, ours, shape in upstream_parameters(keys, built.cfg, arch_of(stem)):
        decayed = len(shape) > 1 if scope == 'mmpretrain' else 'norm' not in name
        expected[ours] = (recipe['lr'], recipe['weight_decay'] if decayed else 0.0)
    actual = settings_by_name(built)
    for name in actual:
        if not name.startswith('backbone.') and scope != 'mmpretrain':
            assert 'norm' not in name
            expected[name] = (recipe['lr'], recipe['weight_decay'])
    assert actual == expected
    assert type(built.optimizer) is torch.optim.AdamW
    assert {(group['betas'], group['eps']) for group in built.optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@every_config
def test_batch_optimizer_clip_precision_and_length(stem):
    cfg = config(stem)
    scope = cfg.default_scope
    assert cfg.train_dataloader.batch_size == IMAGES_PER_DEVICE[scope]
    assert cfg.get('auto_scale_lr', {}).get('base_batch_size', 16) == DEVICES * IMAGES_PER_DEVICE[scope]
    assert not cfg.get('auto_scale_lr', {}).get('enable', False)
    assert plain(cfg.optim_wrapper.optimizer) == OPTIMIZERS[scope]
    rest = {k: v for k, v in plain(cfg.optim_wrapper).items() if k not in ('optimizer', 'paramwise_cfg')}
    length = {k: v for k, v in cfg.train_cfg.items() if k.startswith('max_')}
    if scope == 'mmpretrain':
        assert cfg.train_dataloader.drop_last
        assert rest == dict(type='AmpOptimWrapper', loss_scale='dynamic', clip_grad=dict(max_norm=5.0))
        assert length == dict(max_epochs=300)
    else:
        assert rest == dict(type='OptimWrapper')
        assert length == (dict(max_iters=160_000) if scope == 'mmseg' else dict(max_epochs=36 if '3x' in stem else 12))


@every_config
def test_model_options(stem):
    cfg = config(stem)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch_of(stem)]
    preprocessor = cfg.data_preprocessor if cfg.default_scope == 'mmpretrain' else cfg.model.data_preprocessor
    assert list(preprocessor.mean) == MEAN and list(preprocessor.std) == STD
    assert preprocessor.get('to_rgb', preprocessor.get('bgr_to_rgb'))


@every_config
def test_augmentation(stem):
    cfg = config(stem)
    section = STEMS[stem]
    assert plain(cfg.train_dataloader.dataset.pipeline) == TRAIN_PIPELINES[section]
    expected = TEST_PIPELINES[section]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert plain(loader.dataset.pipeline)[: len(expected)] == expected


def test_augmentation_defaults_of_classification_are_upstreams():
    from mmpretrain.registry import TRANSFORMS

    cfg = load(FILES['spatialmamba-tiny_8xb128_in1k'])
    built = {t['type']: TRANSFORMS.build(t) for t in cfg.train_dataloader.dataset.pipeline}
    crop, augment, erase = (built[name] for name in ('RandomResizedCrop', 'RandAugment', 'RandomErasing'))
    assert (crop.crop_ratio_range, crop.aspect_ratio_range) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert erase.aspect_range == (3 / 10, 10 / 3)
    operations = [(type(t).__name__, t.magnitude_range) for t in augment.transforms]
    assert operations == RAND_AUGMENT
    for transform in augment.transforms:
        assert transform.prob == 0.5
        if transform.magnitude_range is not None:
            assert (transform.magnitude_level, transform.magnitude_std, transform.total_level) == (9, 0.5, 10)


@pytest.mark.parametrize('stem', SECTIONS['ImageNet-1K'])
def test_mixing_smoothing_ema_and_mesa(stem):
    from mmpretrain.models.utils.batch_augments import RandomBatchAugment

    cfg = config(stem)
    assert plain(cfg.model.train_cfg) == dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])
    mixing = RandomBatchAugment(**cfg.model.train_cfg)
    assert mixing.probs is None or list(mixing.probs) == [0.5, 0.5]
    assert all(augment is not None for augment in mixing.augments)
    assert plain(cfg.model.head.loss) == dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    assert cfg.custom_hooks == [
        dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL'),
        dict(type='MESAHook', loss_weight=MESA[arch_of(stem)]),
    ]
    assert HOOKS.build(cfg.custom_hooks[1]).begin * cfg.train_cfg.max_epochs == 75


@pytest.mark.parametrize('stem', [stem for stem in STEMS if stem not in SECTIONS['ImageNet-1K']])
def test_dense_prediction_has_neither_ema_nor_mesa(stem):
    hooks = {hook.type for hook in config(stem).get('custom_hooks', [])}
    assert not hooks & {'EMAHook', 'MESAHook'}


class Parameter(BaseModel):
    """One parameter, to schedule its learning rate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return {'loss': self.weight.sum()}


_learning_rates = {}


def learning_rates(cfg):
    """The learning rate of every iteration of a training, from mmengine's own runner, schedulers and hook."""
    key = str((cfg.param_scheduler, cfg.train_cfg))
    if key in _learning_rates:
        return _learning_rates[key]
    length = EPOCH_LENGTH[cfg.default_scope]
    with tempfile.TemporaryDirectory() as work_dir:
        runner = Runner(
            model=Parameter(),
            work_dir=work_dir,
            experiment_name=f'schedule-{len(_learning_rates)}',
            train_dataloader=torch.utils.data.DataLoader(range(length)),
            train_cfg=cfg.train_cfg,
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=cfg.optim_wrapper.optimizer.lr)),
            param_scheduler=cfg.param_scheduler,
            default_scope=cfg.default_scope,
            log_level='WARNING',
        )
        by_epoch = 'max_epochs' in cfg.train_cfg
        total = runner.train_loop.max_iters
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.param_schedulers = runner.build_param_scheduler(cfg.param_scheduler)
        group = runner.optim_wrapper.optimizer.param_groups[0]
        runner.optim_wrapper.step()
        hook = ParamSchedulerHook()
        rates = np.empty(total)
        for i in range(total):
            rates[i] = group['lr']
            hook.after_train_iter(runner, i)
            if by_epoch and (i + 1) % length == 0:
                hook.after_train_epoch(runner)
    return _learning_rates.setdefault(key, rates)


def warm_up_then_cosine(t, epoch_length):
    """timm's CosineLRScheduler as upstream sets it, at update number t; the cosine starts after the warm-up."""
    warm_up, total = 20 * epoch_length, 300 * epoch_length
    rising = 1e-6 + t / warm_up * (1e-3 - 1e-6)
    falling = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * (t - warm_up) / (total - warm_up)))
    return np.where(t < warm_up, rising, falling)


def warm_up_then_steps(t, epochs):
    rising = np.minimum(0.001 + 0.999 * t / 999, 1.0)
    drops = (t // EPOCH_LENGTH['mmdet'])[:, None] >= np.array({12: (8, 11), 36: (27, 33)}[epochs])
    return 1e-4 * rising * 0.1 ** drops.sum(1)


def warm_up_then_line(t):
    rising = 1e-6 + (1 - 1e-6) * t / 1499
    return 6e-5 * np.where(t < 1500, rising, 1 - (t - 1500) / (160_000 - 1500 - 1))


@pytest.mark.slow
@every_config
def test_learning_rate_of_every_iteration(stem):
    cfg = config(stem)
    rates = learning_rates(cfg)
    t = np.arange(len(rates))
    if cfg.default_scope == 'mmpretrain':
        length = EPOCH_LENGTH['mmpretrain']
        assert len(rates) == 300 * length
        # mmengine reaches the top one iteration before timm does, and upstream sets the rate after an iteration.
        upstream = warm_up_then_cosine(np.maximum(t - 1, 0), length)
        one_iteration = 1e-3 / (20 * length)
        np.testing.assert_allclose(rates, upstream, rtol=0, atol=2 * one_iteration)
        after = slice(20 * length, None)
        np.testing.assert_allclose(rates[after], warm_up_then_cosine(t, length)[after], rtol=1e-9)
        assert rates[0] == pytest.approx(1e-6, rel=1e-12)
        assert rates[20 * length] == rates.max() == pytest.approx(1e-3, rel=1e-9)
        assert rates[-1] == rates[after].min() == pytest.approx(1e-5, rel=1e-6)
    elif cfg.default_scope == 'mmdet':
        epochs = 36 if '3x' in stem else 12
        assert len(rates) == epochs * EPOCH_LENGTH['mmdet']
        np.testing.assert_allclose(rates, warm_up_then_steps(t, epochs), rtol=1e-9)
    else:
        assert len(rates) == 160_000
        np.testing.assert_allclose(rates, warm_up_then_line(t), rtol=1e-9, atol=1e-15)


def show(value):
    """A value of a config, in a table."""
    if isinstance(value, dict):
        arguments = ', '.join(f'{k}={show(v)}' for k, v in value.items() if k != 'type')
        return f'{value["type"]}({arguments})' if 'type' in value else f'({arguments})'
    if isinstance(value, (list, tuple)):
        return f'[{", ".join(show(v) for v in value)}]'
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def images(loader):
    steps = plain(loader.dataset.pipeline)
    return '; '.join(show(step) for step in steps if not step['type'].startswith(('Load', 'Pack')))


def recipe(stem):
    """What a published config says, by setting."""
    cfg = config(stem)
    rates = learning_rates(cfg)
    wrapper = cfg.optim_wrapper
    optimizer = plain(wrapper.optimizer)
    batch = cfg.train_dataloader.batch_size
    hooks = {hook.type: hook for hook in cfg.get('custom_hooks', [])}
    rows = {
        'images per batch': f'{DEVICES} devices x {batch} = {DEVICES * batch}',
        'length': next(f'{v} {k[4:]}' for k, v in cfg.train_cfg.items() if k.startswith('max_')),
        'optimizer': show(optimizer),
        'schedule': '; '.join(show(plain(s)) for s in cfg.param_scheduler),
        'learning rate, first iteration': show(float(rates[0])),
        'learning rate, highest': show(float(rates.max())),
        'learning rate, last iteration': f'{rates[-1]:.4g}',
        'gradient norm, at most': show(wrapper.clip_grad.max_norm if wrapper.get('clip_grad') else 'not limited'),
        'precision': 'fp16 autocast, dynamic loss scale' if wrapper.type == 'AmpOptimWrapper' else 'float32',
        'stochastic depth': show(cfg.model.backbone.drop_path_rate),
        'training images': images(cfg.train_dataloader),
        'test images': images(cfg.test_dataloader),
    }
    if cfg.default_scope == 'mmpretrain':
        rows['mixing, one of them per batch'] = '; '.join(show(a) for a in plain(cfg.model.train_cfg.augments))
        rows['loss'] = show(plain(cfg.model.head.loss))
        ema, mesa = hooks['EMAHook'], hooks['MESAHook']
        rows['EMA'] = f'decay {1 - ema.momentum:.4f}, of parameters{" and buffers" * ema.update_buffers}'
        rows['MESA, weight'] = show(mesa.loss_weight)
        rows['MESA, from epoch'] = show(HOOKS.build(mesa).begin * cfg.train_cfg.max_epochs)
    return rows


def tables(keys):
    """The generated part of the page."""
    lines = []
    for section, stems in SECTIONS.items():
        recipes = {arch_of(stem): recipe(stem) for stem in stems}
        links = ', '.join(f'[{arch_of(s)}](../{FILES[s].relative_to(ROOT).as_posix()})' for s in stems)
        lines += [f'## {section}', '', f'Configs: {links}.', '', '| setting | value |', '|---|---|']
        for setting in next(iter(recipes.values())):
            values = {arch: rows[setting] for arch, rows in recipes.items()}
            same = len(set(values.values())) == 1
            text = next(iter(values.values())) if same else ', '.join(f'{a}: {v}' for a, v in values.items())
            lines.append(f'| {setting} | {text} |')
        lines.append('')
    lines += ['## Weight decay, by upstream name', '']
    lines += ['| parameter | shape, tiny | ImageNet-1K | COCO | ADE20K |', '|---|---|---|---|---|']
    rows = {}
    for column, stem in enumerate(s for s in STEMS if '-tiny' in s and '3x' not in s):
        model = build(stem)
        settings = settings_by_name(model)
        for name, ours, shape in upstream_parameters(keys, model.cfg, 'tiny'):
            row = rows.setdefault(re.sub(r'\.(?:layers|blocks)\.\d+|^layers\.\d+', hide_index, name), [shape, {}])
            row[1].setdefault(column, set()).add(settings[ours][1])
    for name, (shape, decays) in rows.items():
        cells = [' / '.join(show(d) for d in sorted(decays.get(column, ()))) or '-' for column in range(3)]
        lines.append(f'| `{name}` | {" x ".join(map(str, shape))} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def hide_index(match):
    return re.sub(r'\d+', 'N', match[0])


def page(keys):
    """The page, with its tables written anew."""
    return PAGE.read_text().split(MARK)[0] + MARK + '\n' + tables(keys)


@pytest.mark.slow
def test_page_is_up_to_date(keys):
    assert PAGE.read_text() == page(keys), 'run: python tests/test_recipes.py'


if __name__ == '__main__':
    PAGE.write_text(page(json.loads((ROOT / 'tests/data/reference/keys.json').read_text())))
