_base_ = [
    'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
    './_base_/coco_instance_tta.py',
]

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)
pretrained = None
checkpoint_file = None  # unsets the weights that the inherited config has for its own backbone

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpatialMamba',
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'), load_audit=dict(type='LoadAuditHook'))
