from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .conv import ConvLayer
from .recompute import recompute


class Downsample(nn.Sequential):
    """Halve the resolution and double the channels, through a depthwise convolution at eight times the width.

    Args:
        channels (int): Number of input channels.
        norm (Callable): Builds the normalisation after the last convolution from a number of channels. Defaults to
            :class:`torch.nn.BatchNorm2d`.
        with_cp (bool): Whether to recompute the layer's activations in backward instead of keeping them. Defaults to
            False.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, with_cp: bool = False) -> None:
        wide = channels * 8
        super().__init__(
            ConvLayer(channels, wide, 1, bias=True),
            ConvLayer(wide, wide, 3, stride=2, groups=wide, bias=True),
            ConvLayer(wide, channels * 2, 1, bias=True, norm=norm, act=False),
        )
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, 2 * channels, ceil(height / 2), ceil(width / 2))."""
        return recompute(self, super().forward, x) if self.with_cp else super().forward(x)
