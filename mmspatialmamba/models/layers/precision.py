"""Linear layers and convolutions that stay fast in bfloat16 and float16 on processors without such instructions."""

from __future__ import annotations

import torch
from torch import nn

from mmspatialmamba.ops import linear
from mmspatialmamba.ops.precision import in_fast_precision

from .convolution import ChannelsLastConvolution, has_slow_gradient


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, through :func:`in_fast_precision`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return in_fast_precision(linear, x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, through :func:`in_fast_precision`, with faster gradients for channels-last maps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, ...)."""
        return in_fast_precision(self._convolve, x, self.weight, self.bias)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if has_slow_gradient(self, x):
            return ChannelsLastConvolution.apply(x, weight, bias, self.stride, self.padding)
        return self._conv_forward(x, weight, bias)
