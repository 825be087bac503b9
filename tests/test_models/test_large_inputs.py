"""Large and odd images, other channel counts, and what training keeps in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from measuring import kept_bytes
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from mmspatialmamba import ops
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import SpatialMambaBlock

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1))
LARGE = [(4096, 4096), (3, 8192), (8192, 3), (1, 1)]
NUM_CLASSES = 3


def image_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def build_backbone(arch='tiny', **options):
    torch.manual_seed(0)
    return SpatialMamba(arch, drop_path_rate=0.0, **options)


def bytes_kept(model, image):
    """Bytes that autograd keeps from a forward pass of a model for its backward pass, besides weights."""

    def forward():
        outputs = model(image)
        assert all(output.isfinite().all() for output in outputs)
        return outputs

    return kept_bytes(forward, model.parameters())


def steps(model, images):
    """Train a model for a step on each image; its parameters' gradients, and its state in the end."""
    gradients = []
    for image in images:
        model.zero_grad()
        sum(output.square().mean() for output in model(image)).backward()
        gradients += [parameter.grad for parameter in model.parameters()]
    return gradients, model.state_dict()


@pytest.mark.parametrize('options', [{}, dict(with_cp=True), dict(frozen_stages=2)], ids=['plain', 'with_cp', 'frozen'])
def test_training_keeps_memory_in_proportion_to_pixels(options):
    backbone = build_backbone(SMALL, **options).train()
    kept = [bytes_kept(backbone, image_of(2, 3, *size)) for size in [(256, 256), (256, 512), (512, 512), (64, 4096)]]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.02)
    assert kept[2] == pytest.approx(4 * kept[0], rel=0.02)
    assert kept[3] == pytest.approx(kept[2], rel=0.02)


@pytest.mark.parametrize(
    'options, share',
    [
        (dict(with_cp=True), 0.1),
        (dict(frozen_stages=2), 0.5),
        (dict(frozen_stages=2, with_cp=True), 0.05),
        (dict(frozen_stages=3), 0.15),
        (dict(frozen_stages=4), 0),
    ],
    ids=['with_cp', 'frozen-2', 'frozen-2-with_cp', 'frozen-3', 'frozen-4'],
)
def test_share_of_the_memory_that_training_keeps(options, share):
    image = image_of(1, 3, 128, 128)
    kept = bytes_kept(build_backbone(**options).train(), image)
    assert kept <= share * bytes_kept(build_backbone().train(), image)


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the ops are not compiled: there was no g++')
def test_a_block_keeps_the_inputs_of_its_products_and_convolutions_alone():
    block, image = SpatialMambaBlock(32), image_of(1, 32, 8, 8).requires_grad_()
    # Inputs of the two encodings and of the two norms; the gate, the inputs of the mixer's convolution, of the scan and
    # of the out norm, of twice the width; the input of GELU, of four times the width. Then time steps, B and C.
    elements = 64 * (32 * (4 + 4 * 2 + 4) + 4)
    assert bytes_kept(block, image) <= 4 * elements + 1024


@pytest.mark.skipif('native' not in ops.available_backends(), reason='the ops are not compiled: there was no g++')
def test_autograd_keeps_2500_bytes_a_pixel():
    assert bytes_kept(build_backbone().train(), image_of(1, 3, 224, 224)) <= 2500 * 224 * 224


@pytest.mark.parametrize('stages', [1, 2, 3, 4])
def test_frozen_stages_keep_nothing(stages):
    backbone = build_backbone(SMALL, frozen_stages=stages).train()
    x = backbone.stem(image_of(2, 3, 128, 128))
    for i, stage in enumerate(backbone.stages[:stages]):
        x = backbone.downsamples[i - 1](x) if i > 0 else x
        assert not x.requires_grad
        x = stage(x)
    assert not x.requires_grad
    outputs = backbone(image_of(2, 3, 128, 128))
    assert [output.requires_grad for output in outputs] == [i >= stages for i in range(4)]


@pytest.mark.parametrize('norm_eval', [False, True], ids=['', 'norm_eval'])
@pytest.mark.parametrize('frozen_stages', [-1, 2])
def test_checkpointing_trains_the_same(norm_eval, frozen_stages):
    options = dict(norm_eval=norm_eval, frozen_stages=frozen_stages)
    images = [image_of(2, 3, 64, 64), 3 * image_of(2, 3, 64, 96)]
    plain = steps(build_backbone(SMALL, **options).train(), images)
    recomputed = steps(build_backbone(SMALL, with_cp=True, **options).train(), images)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    'size', [pytest.param(size, marks=pytest.mark.slow) for size in LARGE[:1]] + LARGE[1:], ids=str
)
def test_whole_inference_equals_the_torch_backend(size):
    backbone, image = build_backbone(SMALL).eval(), image_of(1, 3, *size)
    with torch.inference_mode():
        outputs = backbone(image)
        with ops.use_backend('torch'):
            expected = backbone(image)
    for i, (output, truth) in enumerate(zip(outputs, expected)):
        assert output.shape == (1, 8 * 2**i, *(-(-side // 2 ** (i + 2)) for side in size))
        torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-4)


def build_model(scope, channels=3, **test_cfg):
    """The demo's segmenter or detector with a smaller backbone, and its config."""
    name = {'mmseg': 'spatialmamba-pico_upernet_photo-digits', 'mmdet': 'mask-rcnn_spatialmamba-pico_fpn_photo-digits'}
    cfg = Config.fromfile(str(CONFIGS / 'demo' / f'{name[scope]}.py'))
    backbone = dict(arch=SMALL, in_channels=channels)
    # mmengine's preprocessor, and so mmdet's, takes one mean for all channels, or three.
    values = channels if scope == 'mmseg' else 1
    preprocessor = dict(mean=[120.0] * values, std=[60.0] * values, bgr_to_rgb=False)
    model = dict(backbone=backbone, data_preprocessor=preprocessor)
    if scope == 'mmseg':
        preprocessor['size'] = (64, 64)
        head = dict(num_classes=NUM_CLASSES, loss_decode=dict(class_weight=None))
        model['decode_head'] = dict(in_channels=[8, 16, 32, 64], channels=16, **head)
        model['auxiliary_head'] = dict(in_channels=32, channels=16, **head)
        model['test_cfg'] = test_cfg
    else:
        model['neck'] = dict(in_channels=[8, 16, 32, 64])
    init_default_scope(scope)
    torch.manual_seed(0)
    cfg.merge_from_dict(dict(model=model))
    return MODELS.build(cfg.model), cfg


def noise(channels, height, width):
    return torch.randint(256, (channels, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def segmentation_sample(height, width):
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    sample.gt_sem_seg = PixelData(data=torch.arange(height * width).view(1, height, width) % NUM_CLASSES)
    return sample


def detection_sample(height, width):
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(
        metainfo=dict(img_id=0, img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1]))
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, 8:40, 8:40] = 1
    sample.gt_instances.masks = BitmapMasks(mask.numpy(), height, width)
    return sample


SAMPLES = {'mmseg': segmentation_sample, 'mmdet': detection_sample}


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('channels', [1, 4, 13])
def test_other_channel_counts_train_and_predict(scope, channels):
    model, cfg = build_model(scope, channels, mode='whole')
    batch = dict(inputs=[noise(channels, 64, 64)] * 2, data_samples=[SAMPLES[scope](64, 64) for _ in range(2)])
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    before = copy.deepcopy(model.backbone.stem.conv1.conv.weight)
    assert before.shape == (4, channels, 3, 3)
    losses = model.train().train_step(batch, optimizer)
    assert losses['loss'].isfinite() and not torch.equal(model.backbone.stem.conv1.conv.weight, before)
    (first, _) = model.eval().test_step(batch)
    if scope == 'mmseg':
        assert first.seg_logits.data.shape == (NUM_CLASSES, 64, 64) and first.seg_logits.data.isfinite().all()
    else:
        assert first.pred_instances.masks.shape[1:] == (64, 64) and first.pred_instances.scores.isfinite().all()


def predict(model, height, width, **test_cfg):
    model.test_cfg = Config(test_cfg)
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    with torch.no_grad():
        (prediction,) = model.test_step(dict(inputs=[noise(3, height, width)], data_samples=[sample]))
    return prediction


@pytest.fixture(scope='module')
def segmenter():
    return build_model('mmseg', mode='whole')[0].eval()


@pytest.mark.parametrize('height', [3, 128])
def test_sliding_window_over_a_wide_image(segmenter, height):
    whole = predict(segmenter, height, 4096, mode='whole')
    slide = predict(segmenter, height, 4096, mode='slide', crop_size=(128, 512), stride=(128, 384))
    assert whole.pred_sem_seg.shape == slide.pred_sem_seg.shape == (height, 4096)
    assert slide.seg_logits.data.isfinite().all()
    # The first window alone covers these pixels, so there it is the prediction of its image.
    window = segmenter.encode_decode(
        segmenter.data_preprocessor(dict(inputs=[noise(3, height, 4096)[..., :512]]))['inputs'],
        [whole.metainfo | dict(img_shape=(height, 512))],
    )
    torch.testing.assert_close(slide.seg_logits.data[..., :384], window[0, ..., :384], rtol=1e-4, atol=1e-5)


def test_one_window_over_all_is_whole_inference(segmenter):
    whole = predict(segmenter, 64, 4096, mode='whole')
    slide = predict(segmenter, 64, 4096, mode='slide', crop_size=(64, 4096), stride=(64, 4096))
    torch.testing.assert_close(slide.seg_logits.data, whole.seg_logits.data, rtol=0, atol=0)
