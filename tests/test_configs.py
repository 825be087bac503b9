import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from test_heads import HEADS

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = {path.stem: path for path in sorted(CONFIGS.glob('*/*.py'))}
ARCHS = ('tiny', 'small', 'base')
PUBLISHED = (
    *(f'spatialmamba-{arch}_8xb128_in1k' for arch in ARCHS),
    *(f'mask-rcnn_spatialmamba-{arch}_fpn_1x_coco' for arch in ARCHS),
    *(f'mask-rcnn_spatialmamba-{arch}_fpn_ms-crop-3x_coco' for arch in ARCHS[:2]),
    *(f'spatialmamba-{arch}_upernet_8xb2-160k_ade20k-512x512' for arch in ARCHS),
)
DEMO = tuple(stem for stem, path in FILES.items() if path.parent.name == 'demo')
FSDP = 'mask-rcnn_spatialmamba-base_fpn_fsdp-1x_coco'
LAYER_DECAY = 'spatialmamba-base_upernet_layer-decay-8xb2-160k_ade20k-512x512'
MASK2FORMERS = [stem for stem in FILES if 'mask2former' in stem]
SMALL_ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1))
SMALL_CHANNELS = [8, 16, 32, 64]


def load(path):
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    return cfg


def build_model(cfg):
    if cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    return importlib.import_module(f'{cfg.default_scope}.registry').MODELS.build(cfg.model)


def shrink(cfg):
    """Make a published config's model small enough to train a step in a second."""
    model = cfg.model
    model.backbone.arch = SMALL_ARCH
    if cfg.default_scope == 'mmdet':
        model.neck.in_channels = SMALL_CHANNELS
        model.roi_head.bbox_head.fc_out_channels = 64
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 50
        model.train_cfg.rcnn.sampler.num = 32
    elif cfg.default_scope == 'mmseg':
        model.decode_head.update(in_channels=SMALL_CHANNELS, channels=16)
        model.auxiliary_head.update(in_channels=SMALL_CHANNELS[2], channels=8)
        model.data_preprocessor.size = (64, 64)
    else:
        model.head.in_channels = SMALL_CHANNELS[3]


def make_batch(cfg, size):
    """Two images of noise with made-up annotations, as the library's data loader hands them to a model."""
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    structures = importlib.import_module(f'{cfg.default_scope}.structures')
    meta = dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0), img_id=0, img_path='')
    if cfg.default_scope == 'mmpretrain':
        samples = [structures.DataSample(metainfo=meta).set_gt_label(i) for i in range(2)]
        return dict(inputs=torch.stack(images), data_samples=samples)
    if cfg.default_scope == 'mmseg':
        samples = [structures.SegDataSample(metainfo=meta) for _ in range(2)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 11, (1, size, size)))
        return dict(inputs=images, data_samples=samples)
    masks = importlib.import_module('mmdet.structures.mask').BitmapMasks
    samples = []
    for _ in range(2):
        sample = structures.DetDataSample(metainfo=meta)
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[0, 8:40, 10:50] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[10.0, 8.0, 50.0, 40.0]]),
            labels=torch.tensor([3]),
            masks=masks(mask.numpy(), size, size),
        )
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def test_configs_are_complete():
    heads = {Path(name).name.replace('tiny', arch) for name in HEADS.values() for arch in ARCHS[:2]}
    assert set(FILES) - set(DEMO) == set(PUBLISHED) | heads | {FSDP, LAYER_DECAY}


@pytest.mark.parametrize('path', FILES.values(), ids=FILES)
def test_names_the_plugin_and_no_other_weights(path):
    cfg = load(path)
    mmdet = ['mmdet.models'] if 'mask2former_8xb2-160k' in path.stem else []
    assert cfg.custom_imports == dict(imports=[*mmdet, 'mmspatialmamba'], allow_failed_imports=False)
    assert cfg.model.backbone.type == 'SpatialMamba'
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=None)
    leaked = {'embed_dims', 'num_heads', 'window_size', 'patch_norm', 'depth', 'style'} & set(cfg.model.backbone)
    assert not leaked
    assert cfg.pretrained is None
    assert {cfg.get(name) for name in ('checkpoint', 'checkpoint_file')} == {None}
    assert cfg.default_hooks.checkpoint.type == 'ResumableCheckpointHook'
    assert path.stem == FSDP or cfg.default_hooks.load_audit.type == 'LoadAuditHook'


@pytest.mark.parametrize('stem', [stem for stem, path in FILES.items() if path.parent.name != 'segmentation'])
def test_learning_rate_is_scaled_from_the_batch_that_it_is_for(stem):
    cfg = load(FILES[stem])
    devices = 1 if stem in DEMO else 8
    # The demo's other configs, as mmseg's, say nothing: --auto-scale-lr is refused.
    base = cfg.get('auto_scale_lr', {}).get('base_batch_size')
    assert base == devices * cfg.train_dataloader.batch_size or (base is None and stem in DEMO)


def test_pretrained_in_a_file_names_the_weights(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / 'configs')
    changed = [path for path in sorted(tmp_path.rglob('*.py')) if 'pretrained = None' in path.read_text()]
    for path in changed:
        path.write_text(path.read_text().replace('pretrained = None', "pretrained = 'weights.pth'"))
        assert Config.fromfile(str(path)).model.backbone.init_cfg.checkpoint == 'weights.pth', path
    assert {path.name for path in changed} == {
        path.name for path in FILES.values() if not re.search('small|base', path.name)
    }


@pytest.mark.slow
@pytest.mark.parametrize('path', FILES.values(), ids=FILES)
def test_builds_at_its_own_size(path):
    cfg = load(path)
    with torch.device('meta'):
        backbone = build_model(cfg).backbone
    readers = (cfg.model.get(name) for name in ('neck', 'panoptic_head', 'decode_head', 'head'))
    wanted = next(reader.in_channels for reader in readers if reader and 'in_channels' in reader)
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    assert [backbone.out_channels[i] for i in backbone.out_indices] == wanted


@pytest.mark.slow
@pytest.mark.parametrize('stem', MASK2FORMERS)
def test_mask2former_decays_no_norm_and_trains_the_backbone_at_a_tenth(stem):
    cfg = load(FILES[stem])
    with torch.device('meta'):
        model = build_model(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
    norms = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)
    for module in model.backbone.modules():
        for parameter in module.parameters(recurse=False):
            group = groups[id(parameter)]
            assert group['weight_decay'] == (0.0 if isinstance(module, norms) else 0.05)
            assert group['lr'] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=stem, marks=pytest.mark.slow if re.search('-small|-base|-3x', stem) else ())
        for stem, path in FILES.items()
        if stem in PUBLISHED + DEMO
    ],
)
def test_trains_a_step_and_predicts(path):
    cfg = load(path)
    if path.stem in PUBLISHED:
        shrink(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    size = cfg.model.data_preprocessor.size[0] if cfg.default_scope == 'mmseg' else 64
    batch = make_batch(cfg, size)
    if cfg.default_scope == 'mmseg':
        for sample in batch['data_samples']:
            sample.gt_sem_seg.data %= cfg.model.decode_head.num_classes
    before = model.backbone.stages[0][0].mixer.in_proj.weight.detach().clone()
    losses = model.train().train_step(batch, optim_wrapper)
    assert all(torch.as_tensor(value).isfinite().all() for value in losses.values())
    assert not torch.equal(model.backbone.stages[0][0].mixer.in_proj.weight, before)
    predictions = model.eval().test_step(make_batch(cfg, size))
    assert len(predictions) == 2


@pytest.mark.slow
def test_upstream_classifier_loads_and_gives_its_logits(keys, goldens):
    import weights

    for arch in ('tiny', 'small', 'base'):
        model = build_model(load(FILES[f'spatialmamba-{arch}_8xb128_in1k'])).eval()
        state = weights.state_dict(keys[f'{arch}_classifier'])
        state = {
            name.replace('head.', 'head.fc.', 1) if name.startswith('head.') else f'backbone.{name}': value
            for name, value in state.items()
        }
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            logits = model.head(model.extract_feat(weights.image((2, 3, 224, 224), 41)))
        truth = goldens[f'model/{arch}/logits']
        assert (logits - truth).norm() < 1e-4 * truth.norm()


def test_other_projects_inherit_by_scope(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmspatialmamba::detection/mask-rcnn_spatialmamba-tiny_fpn_1x_coco.py'\n")
    cfg = Config.fromfile(str(config))
    assert isinstance(cfg.model, ConfigDict) and cfg.model.backbone.arch == 'tiny'
