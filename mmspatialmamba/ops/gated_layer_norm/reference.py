"""The gated LayerNorm in plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..library import compute_dtype


def gated_layer_norm(x, gate, weight, bias, eps):
    # PyTorch's own layer_norm takes mean and variance for constants in its third derivatives, which are wrong.
    wide, weight, bias, gate = (t.to(compute_dtype(x, gate, weight, bias)) for t in (x, weight, bias, gate))
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return ((normalised * weight + bias) * F.silu(gate)).to(x.dtype)
