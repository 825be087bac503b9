_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../detection/_base_/backbone_norms.py',
]

custom_imports = dict(imports=['mmdet.models', 'mmspatialmamba'], allow_failed_imports=False)
pretrained = None

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpatialMamba',
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={{_base_.backbone_norms}}))
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'), load_audit=dict(type='LoadAuditHook'))
