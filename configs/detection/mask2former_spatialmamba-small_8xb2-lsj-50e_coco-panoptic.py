_base_ = './mask2former_spatialmamba-tiny_8xb2-lsj-50e_coco-panoptic.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
