"""Layer-wise learning rates of models of all three libraries, against a table."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmspatialmamba.models import SpatialMamba

CONFIGS = Path(__file__).parents[2] / 'configs'
CLASSIFIER = 'classification/spatialmamba-tiny_8xb128_in1k.py'
DETECTOR = 'detection/mask-rcnn_spatialmamba-tiny_fpn_1x_coco.py'
SEGMENTOR = 'segmentation/spatialmamba-base_upernet_layer-decay-8xb2-160k_ade20k-512x512.py'
OURS = 'LayerDecayOptimWrapperConstructor'
SMALL = dict(embed_dims=8, depths=(1, 2, 1, 1))
# The backbone's shares of the learning rate at half of it from layer to layer; everything else has all of it.
SHARES = {
    'backbone.stem.': 1 / 64,
    'backbone.stages.0.0.': 1 / 32,
    'backbone.downsamples.0.': 1 / 16,
    'backbone.stages.1.0.': 1 / 16,
    'backbone.stages.1.1.': 1 / 8,
    'backbone.downsamples.1.': 1 / 4,
    'backbone.stages.2.0.': 1 / 4,
    'backbone.downsamples.2.': 1 / 2,
    'backbone.stages.3.0.': 1 / 2,
}


def groups(config, constructor, frozen_stages=-1, **paramwise):
    """The options of each parameter's group in a config's optimizer, by its name, and the optimizer's learning rate."""
    cfg = Config.fromfile(str(CONFIGS / config))
    cfg.model.backbone.arch = SMALL
    cfg.model.backbone.frozen_stages = frozen_stages
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    cfg.merge_from_dict({'optim_wrapper.constructor': constructor, 'optim_wrapper.type': 'OptimWrapper'})
    cfg.optim_wrapper.pop('loss_scale', None)
    cfg.optim_wrapper.paramwise_cfg.update(paramwise)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    of_parameter = {parameter: group for group in optimizer.param_groups for parameter in group['params']}
    named = {name: of_parameter[p] for name, p in model.named_parameters() if p.requires_grad}
    return named, cfg.optim_wrapper.optimizer.lr


def share(name):
    return next((value for prefix, value in SHARES.items() if name.startswith(prefix)), 1)


@pytest.mark.parametrize(
    'config, constructor',
    [
        (CLASSIFIER, OURS),
        (DETECTOR, OURS),
        (SEGMENTOR, OURS),
        (CLASSIFIER, 'LearningRateDecayOptimWrapperConstructor'),
    ],
    ids=['mmpretrain', 'mmdet', 'mmseg', "mmpretrain's own"],
)
def test_learning_rates_are_those_of_the_table(config, constructor):
    found, lr = groups(config, constructor, layer_decay_rate=0.5)
    assert {name: group['lr'] for name, group in found.items()} == {name: lr * share(name) for name in found}
    assert all(any(name.startswith(prefix) for name in found) for prefix in (*SHARES, 'backbone.norm3.'))


def test_other_options_keep_their_effect():
    keys = {'backbone': dict(lr_mult=0.1), 'head.mask': dict(lr_mult=2.0, decay_mult=0.0)}
    found, lr = groups(DETECTOR, OURS, 1, layer_decay_rate=0.5, custom_keys=keys)
    assert not [name for name in found if name.startswith(('backbone.stem', 'backbone.stages.0'))]
    for name, group in found.items():
        assert group['lr'] == pytest.approx(
            lr * (0.1 * share(name) if name.startswith('backbone') else 2 if 'head.mask' in name else 1)
        )
        assert group['weight_decay'] == (0 if 'head.mask' in name else 0.05)


def test_depths_of_an_arch():
    with torch.device('meta'):
        backbone = SpatialMamba('tiny')
    names = ('stem.conv1.conv.weight', 'stages.3.3.cpe1.bias', 'downsamples.2.0.conv.bias', 'norm0.weight')
    assert [backbone.get_layer_depth(name) for name in names] == [(0, 20), (18, 20), (15, 20), (19, 20)]
    assert backbone.get_layer_depth('head.stem.weight', 'backbone.') == (19, 20)


def test_missing_rate_is_an_error():
    with pytest.raises(ValueError, match='paramwise_cfg must have a layer_decay_rate, such as 0.9'):
        build_optim_wrapper(torch.nn.Linear(1, 1), dict(constructor=OURS, optimizer=dict(type='SGD', lr=1)))


def test_backbone_without_depths_is_an_error():
    optimizer = dict(type='SGD', lr=1)
    cfg = dict(constructor=OURS, optimizer=optimizer, paramwise_cfg=dict(layer_decay_rate=0.9))
    with pytest.raises(ValueError, match='Linear has no backbone with get_layer_depth'):
        build_optim_wrapper(torch.nn.Linear(1, 1), cfg)
