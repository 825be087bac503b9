_base_ = './spatialmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=768))
custom_hooks = [{{_base_.ema_hook}}, dict(type='MESAHook', loss_weight=2.0)]
