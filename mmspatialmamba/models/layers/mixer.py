from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mmspatialmamba.ops import depthwise_conv, gated_layer_norm, linear, structure_aware_scan
from mmspatialmamba.ops.backend import fuses_elementwise, has_products

from .inference import is_untouched
from .precision import Linear
from .recompute import Recomputed, feed


class StructureAwareSSM(nn.Module):
    """Structure-aware state-space mixer (Spatial-Mamba, section 3.3), state size 1.

    Args:
        channels (int): Number of input and output channels; the inner width is twice that.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels * 2
        self.dt_rank = math.ceil(channels / 16)
        self.in_proj = Linear(channels, inner * 2, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = Linear(inner, self.dt_rank + 2, bias=False)
        self.dt_proj = Linear(self.dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.fusion_kernels = nn.ParameterList(torch.ones(inner, 1, 3, 3) for _ in range(3))
        self.fusion_alpha = nn.Parameter(torch.ones(3))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Linear(inner, channels, bias=False)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        dt.add_(torch.log(-torch.expm1(-dt)))

    def scan(self, u: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """Structure-aware scan of (batch, inner, height, width) with (batch, height, width, inner or 1) of the others.

        The output is (batch, height, width, inner).
        """
        return structure_aware_scan(
            u,
            delta.permute(0, 3, 1, 2),
            -torch.exp(self.A_log.float()),
            B.permute(0, 3, 1, 2),
            C.permute(0, 3, 1, 2),
            self.D,
            tuple(self.fusion_kernels),
            self.fusion_alpha,
            self.dt_bias,
        ).permute(0, 2, 3, 1)

    def _project(self, x: Recomputed) -> tuple[torch.Tensor, torch.Tensor]:
        """The halves of ``in_proj``, of their own where that saves their gradients from being joined."""
        if is_untouched(self.in_proj, (Linear,)) and has_products(x.tensor, self.in_proj.weight):
            return feed(lambda x: tuple(linear(x, half) for half in self.in_proj.weight.chunk(2)), x)
        return feed(self.in_proj, x).chunk(2, dim=-1)

    def forward(self, x: torch.Tensor, norm: Callable) -> torch.Tensor:
        """Mix the pixels of ``norm(x)``, (batch, height, width, channels); the output has its shape."""
        x, z = self._project(Recomputed(norm, x))
        weight, bias = self.conv.weight, self.conv.bias
        fused = fuses_elementwise(x, weight, bias)
        u = Recomputed(depthwise_conv, x.permute(0, 3, 1, 2), weight, bias, 'silu', cheap=fused)
        projected = feed(lambda u: self.x_proj(u.permute(0, 2, 3, 1)), u)
        dt, B, C = projected.split([self.dt_rank, 1, 1], dim=-1)

        y = feed(lambda u, delta: self.scan(u, delta, B, C), u, Recomputed(self.dt_proj, dt))
        norm = self.out_norm
        return feed(self.out_proj, Recomputed(gated_layer_norm, y, z, norm.weight, norm.bias, norm.eps))
