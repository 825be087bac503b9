# ruff: noqa: F403, F405
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmdet.models import FPN, DetDataPreprocessor, RetinaHead, RetinaNet
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import EpochBasedTrainLoop, TestLoop

from mmspatialmamba.models import SpatialMamba

with read_base():
    from .runtime import *

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        type=SpatialMamba,
        arch=dict(embed_dims=8, depths=(1, 1, 1, 1)),
        drop_path_rate=0.0,
        norm_cfg=norm_cfg,
        init_cfg=dict(type=PretrainedInit, checkpoint=None),
    ),
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=10,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        anchor_generator=dict(type=AnchorGenerator, scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset,
        data_root='data/coco/',
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        metainfo=dict(classes=tuple('0123456789')),
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(64, 64), keep_ratio=True),
            dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    ),
)
test_dataloader = train_dataloader
test_evaluator = dict(type=CocoMetric, ann_file='data/coco/annotations/instances_train2017.json')
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
test_cfg = dict(type=TestLoop)
