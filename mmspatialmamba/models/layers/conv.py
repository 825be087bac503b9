from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class PointwiseConv(nn.Conv2d):
    """1x1 convolution as a linear layer over the channels of a channels-last map.

    PyTorch's convolution falls back to a slow kernel for many of these shapes on a CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map, whose hooks see (batch, channels, height, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvLayer(nn.Sequential):
    """Convolution, then normalisation and ReLU where asked for, with PyTorch's default initial weights.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int): Odd size of the kernel; the padding is half of it.
        stride (int): Stride of the convolution. Defaults to 1.
        groups (int): Groups of the convolution. Defaults to 1.
        bias (bool): Whether the convolution has a bias. Defaults to False.
        norm (Callable, optional): Builds the normalisation from a number of channels. Defaults to None, which means no
            normalisation.
        act (bool): Whether ReLU follows. Defaults to True.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
        act: bool = True,
    ) -> None:
        super().__init__()
        conv = PointwiseConv if kernel_size == 1 else nn.Conv2d
        self.conv = conv(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        if norm is not None:
            self.norm = norm(out_channels)
        if act:
            self.act = nn.ReLU()
