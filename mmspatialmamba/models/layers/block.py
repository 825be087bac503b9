from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .fused import depthwise_conv_residual, gelu_linear, layer_norm_linear
from .mixer import StructureAwareSSM
from .recompute import recompute


class MLP(nn.Module):
    """Pre-norm MLP: LayerNorm, Linear, GELU, Linear over the last dimension.

    Args:
        channels (int): Number of input and output channels.
        ratio (int): Hidden channels per input channel. Defaults to 4.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * ratio)
        self.fc2 = nn.Linear(channels * ratio, channels)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each pixel of (..., channels); the output has its shape."""
        return gelu_linear(self.fc2, layer_norm_linear(self.ln, self.fc1, x))


class SpatialMambaBlock(nn.Module):
    """Conditional positional encoding, mixer, encoding again, MLP; each added to its input (Spatial-Mamba, figure 3).

    Args:
        channels (int): Number of input and output channels.
        drop_path (Callable): Builds the stochastic depth of mixer and MLP, one module for each. Defaults to
            :class:`torch.nn.Identity`.
        with_cp (bool): Whether to recompute the block's activations in backward instead of keeping them. Defaults to
            False.
    """

    def __init__(self, channels: int, drop_path: Callable[[], nn.Module] = nn.Identity, with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.cpe1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mixer = StructureAwareSSM(channels)
        self.drop_path1 = drop_path()
        self.cpe2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mlp = MLP(channels)
        self.drop_path2 = drop_path()

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = depthwise_conv_residual(self.cpe1, x).permute(0, 2, 3, 1)
        x = (x + self.drop_path1(self.mixer(x))).permute(0, 3, 1, 2)
        x = depthwise_conv_residual(self.cpe2, x).permute(0, 2, 3, 1)
        return (x + self.drop_path2(self.mlp(x))).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same, best in the channels-last memory format."""
        return recompute(self, self._forward, x) if self.with_cp else self._forward(x)
