from .audit import LoadReport, audit, inflate, read_backbone
from .convert import find_backbones, is_classifier, to_mmengine
from .errors import CheckpointError
from .reader import read_checkpoint, register_checkpoint_loaders
from .safe_globals import allow_training_checkpoints

__all__ = [
    'CheckpointError',
    'LoadReport',
    'allow_training_checkpoints',
    'audit',
    'find_backbones',
    'inflate',
    'is_classifier',
    'read_backbone',
    'read_checkpoint',
    'register_checkpoint_loaders',
    'to_mmengine',
]
