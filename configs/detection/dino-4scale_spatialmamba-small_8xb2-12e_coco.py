_base_ = './dino-4scale_spatialmamba-tiny_8xb2-12e_coco.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
