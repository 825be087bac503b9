_base_ = './spatialmamba-tiny_upernet_4xb2-80k_cityscapes-512x1024.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
