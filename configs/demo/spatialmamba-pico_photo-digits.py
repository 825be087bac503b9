_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)
pretrained = None

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SpatialMamba',
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1)),
        out_indices=(3,),
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
    ),
)

data_preprocessor = dict(num_classes=10, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
# A mirrored digit is another sign, but a negative of it is the same digit.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Invert', prob=0.0), dict(type='Invert', prob=1.0)],
            [dict(type='PackInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type='CustomDataset',
        data_root='data/photo_digits/imagenet',
        data_prefix='train',
        pipeline=pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type='CustomDataset',
        data_root='data/photo_digits/imagenet',
        data_prefix='val',
        pipeline=pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=5, val_interval=5)
val_cfg = {}
test_cfg = {}
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=60),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(type='ResumableCheckpointHook', max_keep_ckpts=1),
    load_audit=dict(type='LoadAuditHook'),
    visualization=dict(rescale_factor=6.0),
)
randomness = dict(seed=0)
