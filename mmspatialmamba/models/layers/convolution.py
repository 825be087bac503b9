"""Convolutions of channels-last maps with a faster gradient than PyTorch's, on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmspatialmamba.ops.linear import linear_weight_gradient

# Neighbourhoods are gathered in groups of about so many elements, which stay in the caches.
_GROUP_ELEMENTS = 2**20


def has_slow_gradient(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether :class:`ChannelsLastConvolution` is the faster way to train a convolution.

    It is where oneDNN would compute the weight's gradient from channels-last maps.

    Args:
        conv (nn.Conv2d): The convolution, zero-padded by numbers.
        x (Tensor): Its input.
    """
    return (
        torch.is_grad_enabled()
        and conv.weight.requires_grad
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, sizes: torch.Size, stride: tuple, padding: tuple):
    """Products of the output's gradient with the neighbourhoods of the input, group by group of rows."""
    out_channels, channels, height, width = sizes
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(1, height, stride[0]).unfold(2, width, stride[1]).permute(0, 1, 2, 4, 5, 3)
    size = height * width * channels
    rows = max(_GROUP_ELEMENTS // (grad.shape[3] * size), 1)
    total = grad.new_zeros(out_channels, size)
    for image, neighbours in zip(grad.permute(0, 2, 3, 1), windows):
        for g, n in zip(image.split(rows), neighbours.split(rows)):
            total = total + linear_weight_gradient(g.reshape(-1, out_channels), n.reshape(-1, size))
    return total.view(out_channels, height, width, channels).permute(0, 3, 1, 2)


class ChannelsLastConvolution(torch.autograd.Function):
    """``F.conv2d``, with the weight's gradient as matrix products, in a third of the time that oneDNN takes for it.

    Its ``apply`` takes the input, (batch, in_channels, height, width), the weight, the bias or None, and stride and
    padding, each a pair.
    """

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight, of_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        geometry = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
        grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias_sizes, *geometry, (of_x, False, of_bias)
        )
        grad_weight = _weight_gradient(grad, x, weight.shape, ctx.stride, ctx.padding) if of_weight else None
        return grad_x, grad_weight, grad_bias, None, None
