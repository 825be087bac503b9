from __future__ import annotations

import torch
from torch import nn

from mmspatialmamba.ops import linear
from mmspatialmamba.ops.depthwise_conv import downsampling_conv, fuses_downsampling
from mmspatialmamba.ops.precision import in_fast_precision

from . import inference
from .precision import Conv2d
from .recompute import recompute


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution as a matrix product over channels, which takes channels-last maps as they are.

    PyTorch's convolution would, on the CPU, fall back to a slow kernel for many of these shapes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        return in_fast_precision(linear, x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvLayer(nn.Sequential):
    """Convolution, then normalisation and ReLU where asked for, with PyTorch's default initial weights.

    mmcv's ConvModule is not used because its ``init_weights`` would replace these by Kaiming's.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int): Odd size of the kernel; the padding is half of it.
        stride (int): Stride of the convolution. Defaults to 1.
        groups (int): Groups of the convolution. Defaults to 1.
        bias (bool): Whether the convolution has a bias. Defaults to False.
        norm_cfg (dict, optional): Config of the normalisation. Defaults to None, which means no normalisation.
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
        norm_cfg: dict | None = None,
        act: bool = True,
    ) -> None:
        super().__init__()
        conv = PointwiseConv if kernel_size == 1 else Conv2d
        self.conv = conv(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        if norm_cfg is not None:
            # Imported late: mmcv.cnn loads mmcv._ext, which importing this package must not need.
            from mmcv.cnn import build_norm_layer

            self.norm = build_norm_layer(norm_cfg, out_channels)[1]
        if act:
            # A pointwise convolution's output is a view: to write into it, autograd would copy the whole map.
            self.act = nn.ReLU(inplace=kernel_size > 1)


_OWN_TYPES = (ConvLayer, PointwiseConv, Conv2d, nn.Sequential, nn.ReLU)


class Stem(nn.Module):
    """Image to tokens at a quarter of the resolution, with overlapping convolutions and a residual branch.

    Args:
        in_channels (int): Number of image channels.
        embed_dims (int): Number of output channels.
        norm_cfg (dict): Config of the normalisation after each convolution.
        with_cp (bool): Whether to recompute the stem in the backward pass instead of storing its activations. Defaults
            to False.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_cfg: dict, with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        half, wide = embed_dims // 2, embed_dims * 4
        self.conv1 = ConvLayer(in_channels, half, 3, stride=2, norm_cfg=norm_cfg)
        self.conv2 = nn.Sequential(
            ConvLayer(half, half, 3, norm_cfg=norm_cfg),
            ConvLayer(half, half, 3, norm_cfg=norm_cfg, act=False),
        )
        self.conv3 = nn.Sequential(
            ConvLayer(half, wide, 3, stride=2, norm_cfg=norm_cfg),
            ConvLayer(wide, embed_dims, 1, norm_cfg=norm_cfg, act=False),
        )
        self._built = inference.as_built(self, (Stem, *_OWN_TYPES))

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the stem is as it was built, with parameters of a dtype."""
        if not inference.is_plain(self, self._built, dtype):
            return False
        convs = (layer.conv for layer in (self.conv1, *self.conv2, self.conv3[0]))
        return inference.has_geometry(convs, (2, 1, 1, 2))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if inference.can_fuse(self, x):
            return inference.stem(self, x)
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_channels, H, W) to (batch, embed_dims, ceil(H / 4), ceil(W / 4))."""
        return recompute(self, self._forward, x) if self.with_cp else self._forward(x)


class Downsample(nn.Sequential):
    """Halve the resolution and double the channels, through a depthwise convolution at eight times the width.

    Args:
        channels (int): Number of input channels.
        norm_cfg (dict): Config of the normalisation after the last convolution.
        with_cp (bool): Whether to recompute the layer in the backward pass instead of storing its activations. Defaults
            to False.
    """

    def __init__(self, channels: int, norm_cfg: dict, with_cp: bool = False) -> None:
        wide = channels * 8
        super().__init__(
            ConvLayer(channels, wide, 1, bias=True),
            ConvLayer(wide, wide, 3, stride=2, groups=wide, bias=True),
            ConvLayer(wide, channels * 2, 1, bias=True, norm_cfg=norm_cfg, act=False),
        )
        self.with_cp = with_cp
        self._built = inference.as_built(self, (Downsample, *_OWN_TYPES))

    def _has_geometry(self) -> bool:
        return inference.has_geometry([self[1].conv], (2,), depthwise=True)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the layer is as it was built, with parameters of a dtype."""
        return inference.is_plain(self, self._built, dtype) and self._has_geometry()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, 2 * channels, ceil(height / 2), ceil(width / 2))."""
        if inference.can_fuse(self, x):
            return inference.downsample(self, x)
        return recompute(self, self._forward, x) if self.with_cp else self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        widen, depthwise, narrow = self
        left_out = [widen, *list(widen.children())[1:], depthwise, *depthwise.children()]
        if not all(inference.is_untouched(module, _OWN_TYPES) for module in left_out):
            return super().forward(x)
        x, parameters = widen.conv(x), (depthwise.conv.weight, depthwise.conv.bias)
        if fuses_downsampling(x, *parameters) and self._has_geometry():
            return narrow(downsampling_conv(x, *parameters))
        return narrow(depthwise(widen.act(x)))
