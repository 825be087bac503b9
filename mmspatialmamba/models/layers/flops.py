"""Multiply-adds of the layers that tools know only if told: those that count by hooks on modules, such as thop."""

from __future__ import annotations

from typing import Any

import torch

from mmspatialmamba.ops.flops import multiply_adds

from .conv import LayerNorm2d, PointwiseConv
from .mixer import StructureAwareSSM


def _count_pointwise_conv(conv: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    conv.total_ops += conv.in_channels * output.numel()


def _count_norm(norm: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    norm.total_ops += 4 * output.numel()


def _count_mixer(mixer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """Count the scan, under the fusion's parameters, and all that is inside: thop does not look there itself."""
    inside = mixer.fusion_kernels
    inside.total_ops += multiply_adds('structure_aware_scan', *output.shape[:-1], mixer.D.numel())
    mixer.total_ops = sum(module.total_ops for module in mixer.modules() if module is not mixer)


# ``custom_ops`` of thop.profile.
THOP_OPS = {LayerNorm2d: _count_norm, PointwiseConv: _count_pointwise_conv, StructureAwareSSM: _count_mixer}
