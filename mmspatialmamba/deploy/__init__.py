"""Forms of a trained model for other uses than training."""

from .cpu import prepare_for_cpu

__all__ = ['prepare_for_cpu']
