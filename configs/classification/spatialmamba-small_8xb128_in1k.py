_base_ = './spatialmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
custom_hooks = [{{_base_.ema_hook}}, dict(type='MESAHook', loss_weight=1.5)]
