_base_ = './mask-rcnn_spatialmamba-base_fpn_1x_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='ResumableFSDPStrategy',
    model_wrapper=dict(auto_wrap_policy='block_wrap_policy'),
    state_dict_cfg='full',
)
# Without LoadAuditHook, which compares the parameters' names and shapes: sharding changes both.
default_hooks = dict(
    _delete_=True,
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='ResumableCheckpointHook', interval=1),
    visualization=dict(type='DetVisualizationHook'),
)
