from __future__ import annotations

import torch
import torch.nn.functional as F

from . import backend


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, on the CPU in float32 with the native backend's products.

    These are as fast as PyTorch's for many channels, and faster for few. Elsewhere, for other dtypes, under autocast,
    ``torch.compile``, export and tracing it is PyTorch's.

    Args:
        x (Tensor): Input, (..., in).
        weight (Tensor): Weight, (out, in).
        bias (Tensor, optional): Bias, (out,). Defaults to None.

    Returns:
        Tensor: (..., out).
    """
    if (
        x.device.type == 'cpu'
        and all(t is None or t.dtype == torch.float32 for t in (x, weight, bias))
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and backend.fuses_elementwise(x)
    ):
        return torch.ops.mmspatialmamba_native.linear(x, weight, bias)
    return F.linear(x, weight, bias)
