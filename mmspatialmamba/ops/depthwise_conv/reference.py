"""The depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..library import compute_dtype


def _convolve(x, weight, bias, finish):
    out = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    if finish == 'silu':
        return F.silu(out)
    return x + out if finish == 'residual' else out


def depthwise_conv(x, weight, bias, finish):
    if not x.is_cpu:
        return _convolve(x, weight, bias, finish)
    # PyTorch's own in half precision rounds the terms of a sum on CPUs without such instructions.
    dtype = compute_dtype(x, weight, bias)
    with torch.autocast('cpu', enabled=False):
        return _convolve(x.to(dtype), weight.to(dtype), bias.to(dtype), finish).to(x.dtype)
