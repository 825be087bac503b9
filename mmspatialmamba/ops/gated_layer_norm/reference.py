"""The gated LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_layer_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * F.silu(gate)
