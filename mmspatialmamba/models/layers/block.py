from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mmspatialmamba.ops import biased_gelu, depthwise_conv, linear
from mmspatialmamba.ops.backend import fuses_elementwise, has_products
from mmspatialmamba.ops.linear import gelu_linear
from mmspatialmamba.ops.precision import in_fast_precision

from . import inference
from .mixer import StructureAwareSSM
from .precision import Linear
from .recompute import Recomputed, feed, recompute


def _is_own(layer: nn.Module) -> bool:
    """Whether a layer is an untouched :class:`Linear` with a bias, which a fused op can take the place of."""
    return inference.is_untouched(layer, (Linear,)) and layer.bias is not None


class MLP(nn.Module):
    """Linear, GELU, Linear over the last dimension of a normalised input.

    Args:
        channels (int): Number of input and output channels.
        ratio (int): Hidden channels per input channel. Defaults to 4.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = Linear(channels, channels * ratio)
        self.fc2 = Linear(channels * ratio, channels)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, norm: Callable) -> torch.Tensor:
        """MLP of ``norm(x)``, (..., channels) to the same."""
        x, fc1, fc2 = Recomputed(norm, x), self.fc1, self.fc2
        if not _is_own(fc1) or not fuses_elementwise(x.tensor, fc1.bias):
            return feed(fc2, Recomputed(F.gelu, feed(fc1, x)))
        hidden = feed(lambda x: in_fast_precision(linear, x, fc1.weight), x)
        if _is_own(fc2):
            others = fc1.bias, fc2.weight, fc2.bias
            if all(parameter.requires_grad for parameter in others) and has_products(hidden, *others):
                return gelu_linear(hidden, *others)
        return feed(fc2, Recomputed(biased_gelu, hidden, fc1.bias))


class SpatialMambaBlock(nn.Module):
    """Conditional positional encoding, mixer, encoding again, MLP; each added to its input (Spatial-Mamba, figure 3).

    Args:
        channels (int): Number of input and output channels.
        drop_path_rate (float): Stochastic depth rate of mixer and MLP. Defaults to 0.
        with_cp (bool): Whether to recompute the block in the backward pass instead of storing its activations.
            Defaults to False.
    """

    def __init__(self, channels: int, drop_path_rate: float = 0.0, with_cp: bool = False) -> None:
        super().__init__()
        # Imported late: mmcv.cnn loads mmcv._ext, which importing this package must not need.
        from mmcv.cnn.bricks import DropPath

        self.with_cp = with_cp
        self.cpe1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.ln1 = nn.LayerNorm(channels)
        self.mixer = StructureAwareSSM(channels)
        self.cpe2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.ln2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        layers = (type(self), StructureAwareSSM, MLP, Linear, DropPath)
        self._own_types = (*layers, nn.Conv2d, nn.LayerNorm, nn.ParameterList, nn.Identity)
        self._built = inference.as_built(self, self._own_types)

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``x + drop_path(y)``; in one pass over memory where stochastic depth scales whole samples of ``y``."""
        scales = self.training and hasattr(self.drop_path, 'drop_prob') and x.dtype.itemsize >= 4
        if not scales or not inference.is_untouched(self.drop_path, self._own_types):
            return x + self.drop_path(y)
        return torch.addcmul(x, y, self.drop_path(x.new_ones(x.shape[0], 1, 1, 1)))

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the block is as it was built, with parameters of a dtype."""
        return inference.is_plain(self, self._built, dtype)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if inference.can_fuse(self, x, casts=False):
            return inference.block(self, x)
        x = depthwise_conv(x, self.cpe1.weight, self.cpe1.bias, 'residual').permute(0, 2, 3, 1)
        x = self._add(x, self.mixer(x, self.ln1)).permute(0, 3, 1, 2)
        x = depthwise_conv(x, self.cpe2.weight, self.cpe2.bias, 'residual').permute(0, 2, 3, 1)
        return self._add(x, self.mlp(x, self.ln2)).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same, best in the channels-last memory format."""
        return recompute(self, self._forward, x) if self.with_cp else self._forward(x)
