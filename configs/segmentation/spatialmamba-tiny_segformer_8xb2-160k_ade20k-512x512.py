_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)
pretrained = None
checkpoint = None  # unsets the weights that the inherited config has for its own backbone

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
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'), load_audit=dict(type='LoadAuditHook'))
