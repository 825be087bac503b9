from __future__ import annotations

import math

import torch
from torch import nn

from .fused import depthwise_conv_silu, gated_layer_norm_linear, layer_norm_linear, linear_scan


class StructureAwareSSM(nn.Module):
    """Pre-norm structure-aware state-space mixer of state size 1 (Spatial-Mamba, section 3.3 and figure 3).

    Args:
        channels (int): Number of input and output channels; the inner width is twice that.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels * 2
        self.dt_rank = math.ceil(channels / 16)
        self.ln = nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, inner * 2, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.fusion_kernels = nn.ParameterList(torch.ones(inner, 1, 3, 3) for _ in range(3))
        self.fusion_alpha = nn.Parameter(torch.ones(3))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        dt.add_(torch.log(-torch.expm1(-dt)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the pixels of (batch, height, width, channels); the output has its shape."""
        x, z = layer_norm_linear(self.ln, self.in_proj, x).chunk(2, dim=-1)
        u = depthwise_conv_silu(self.conv, x.permute(0, 3, 1, 2))
        dt, B, C = self.x_proj(u.permute(0, 2, 3, 1)).split([self.dt_rank, 1, 1], dim=-1)
        B, C = B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)
        A = -torch.exp(self.A_log.float())
        kernels = tuple(self.fusion_kernels)
        y = linear_scan(self.dt_proj, u, dt, A, B, C, self.D, kernels, self.fusion_alpha, self.dt_bias)
        return gated_layer_norm_linear(self.out_norm, self.out_proj, y.permute(0, 2, 3, 1), z)
