"""Linear layers and convolutions that stay fast in bfloat16 and float16 on processors without such instructions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mmspatialmamba.ops import linear

from .convolution import ChannelsLastConvolution, has_slow_gradient


def _slow_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes whose products PyTorch computes on this processor several times slower than float32's."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return tuple(dtype for dtype, is_supported in supported.items() if not is_supported())


_SLOW_DTYPES = _slow_dtypes() if torch.backends.mkldnn.is_available() else (torch.bfloat16, torch.float16)


def is_fast(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in a dtype for this processor. Others take several times as long as in float32.

    Args:
        dtype (torch.dtype): A floating point dtype.
    """
    return dtype not in _SLOW_DTYPES


def in_fast_precision(function: Callable, x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """Apply a product, in float32 where the processor has no instructions for its dtype.

    Args:
        function (Callable): Takes ``x`` and ``parameters``.
        x (Tensor): The input.
        *parameters (Tensor, optional): Weight and bias.

    Returns:
        Tensor: The result, of the dtype that ``function`` would return: autocast's, else x's.
    """
    if x.device.type != 'cpu':
        return function(x, *parameters)
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    if is_fast(dtype):
        return function(x, *parameters)
    with torch.autocast('cpu', enabled=False):
        promoted = (None if parameter is None else parameter.float() for parameter in parameters)
        return function(x.float(), *promoted).to(dtype)


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
