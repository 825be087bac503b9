# ruff: noqa: F403, F405
from mmcv.transforms import LoadImageFromFile
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import EpochBasedTrainLoop, TestLoop
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.evaluation import IoUMetric
from mmseg.models import CrossEntropyLoss, EncoderDecoder, SegDataPreProcessor, UPerHead

from mmspatialmamba.models import SpatialMamba

with read_base():
    from .runtime import *

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, mean=[127.5] * 3, std=[127.5] * 3, size=(64, 64)),
    backbone=dict(
        type=SpatialMamba,
        arch=dict(embed_dims=8, depths=(1, 1, 1, 1)),
        drop_path_rate=0.0,
        norm_cfg=norm_cfg,
        init_cfg=dict(type=PretrainedInit, checkpoint=None),
    ),
    decode_head=dict(
        type=UPerHead,
        in_channels=[8, 16, 32, 64],
        in_index=[0, 1, 2, 3],
        pool_scales=(2,),
        channels=16,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss),
    ),
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=BaseSegDataset,
        data_root='data/ade',
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        metainfo=dict(classes=tuple('p0123456789'), palette=[(0, 0, 0)] * 11),
        reduce_zero_label=True,
        pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackSegInputs)],
    ),
)
test_dataloader = train_dataloader
test_evaluator = dict(type=IoUMetric)
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
test_cfg = dict(type=TestLoop)
