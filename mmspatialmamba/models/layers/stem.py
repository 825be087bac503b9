from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .conv import ConvLayer
from .recompute import recompute


class Stem(nn.Module):
    """Image to tokens at a quarter of the resolution, with overlapping convolutions and a residual branch.

    Args:
        in_channels (int): Number of image channels.
        embed_dims (int): Number of output channels.
        norm (Callable): Builds the normalisation after each convolution from a number of channels. Defaults to
            :class:`torch.nn.BatchNorm2d`.
        with_cp (bool): Whether to recompute the stem's activations in backward instead of keeping them. Defaults to
            False.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        half, wide = embed_dims // 2, embed_dims * 4
        self.conv1 = ConvLayer(in_channels, half, 3, stride=2, norm=norm)
        self.conv2 = nn.Sequential(
            ConvLayer(half, half, 3, norm=norm),
            ConvLayer(half, half, 3, norm=norm, act=False),
        )
        self.conv3 = nn.Sequential(
            ConvLayer(half, wide, 3, stride=2, norm=norm),
            ConvLayer(wide, embed_dims, 1, norm=norm, act=False),
        )

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, H, W) to (batch, embed_dims, ceil(H / 4), ceil(W / 4))."""
        return recompute(self, self._forward, x) if self.with_cp else self._forward(x)
