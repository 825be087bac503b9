from __future__ import annotations

import logging
from collections.abc import Sequence

from mmengine.logging import print_log

from mmspatialmamba.registry import register_model

from .spatial_mamba import SpatialMamba

_SWIN_ARGUMENTS = (
    'act_cfg attn_drop_rate convert_weights drop_rate embed_dims init_cfg mlp_ratio norm_cfg num_heads patch_norm '
    'patch_size pretrain_img_size qk_scale qkv_bias strides use_abs_pos_embed window_size'
)


@register_model
class MM_SpatialMamba(SpatialMamba):
    """:class:`SpatialMamba` under the name and with the arguments of the original release's detection configs.

    Those configs inherit a Swin Transformer's without deleting its arguments, so these are dropped, with one warning
    that lists them. New configs should use :class:`SpatialMamba`.

    Args:
        dims (int): Number of channels of the first stage. Defaults to 64.
        depths (Sequence[int]): Number of blocks of each stage. Defaults to (2, 4, 8, 4).
        d_state (int): State size; only 1 exists. Defaults to 1.
        **kwargs: Other arguments of :class:`SpatialMamba`, and the Swin Transformer's, which are dropped.

    Raises:
        ValueError: If ``d_state`` is not 1.
        TypeError: If an argument is neither :class:`SpatialMamba`'s nor the Swin Transformer's.
    """

    def __init__(
        self,
        dims: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        d_state: int = 1,
        **kwargs,
    ) -> None:
        if d_state != 1:
            raise ValueError(f'MM_SpatialMamba: d_state must be 1, the only state size there is, but is {d_state}')
        dropped = sorted(kwargs.keys() & _SWIN_ARGUMENTS.split())
        if dropped:
            print_log(
                f"MM_SpatialMamba: dropped these arguments of the Swin Transformer's config: {', '.join(dropped)}",
                logger='current',
                level=logging.WARNING,
            )
        super().__init__(
            arch=dict(embed_dims=dims, depths=depths),
            **{key: value for key, value in kwargs.items() if key not in dropped},
        )
