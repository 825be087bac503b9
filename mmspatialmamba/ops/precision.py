"""Products in bfloat16 and float16 which are summed in float32 on processors without such instructions."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _slow_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes that oneDNN has no products in for this processor.

    PyTorch's own take several times as long as in float32, and some of them round the terms of a sum.
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return tuple(dtype for dtype, is_supported in supported.items() if not is_supported())


_SLOW_DTYPES = _slow_dtypes() if torch.backends.mkldnn.is_available() else (torch.bfloat16, torch.float16)


def in_fast_precision(function: Callable, x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """Apply a product, in float32 where the processor has no instructions for its dtype.

    Autocast leaves float64 as it is.

    Args:
        function (Callable): Takes ``x`` and ``parameters``.
        x (Tensor): The input.
        *parameters (Tensor, optional): Weight and bias.

    Returns:
        Tensor: The result, of the dtype that ``function`` would return: autocast's, else x's.
    """
    if x.device.type != 'cpu' or x.dtype == torch.float64:
        return function(x, *parameters)
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    if dtype not in _SLOW_DTYPES:
        return function(x, *parameters)
    with torch.autocast('cpu', enabled=False):
        promoted = (None if parameter is None else parameter.float() for parameter in parameters)
        return function(x.float(), *promoted).to(dtype)
