from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmspatialmamba.registry import SCOPE, register_model, type_name

from ..layers import Downsample, LayerNorm2d, SpatialMambaBlock, Stem
from ..utils import from_upstream, is_upstream

_PRETRAINED = ('Pretrained', 'PretrainedInit')


@register_model
class SpatialMamba(BaseModule):
    """Spatial-Mamba backbone.

    A PyTorch implementation of `Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion
    <https://arxiv.org/abs/2410.15091>`_ (ICLR 2025).

    Each stage's output is normalised by a LayerNorm of its own. State dicts with the original release's names load as
    they are: the backbone renames them while it loads. What is loaded from a file is audited (docs/checkpoints.md).

    Args:
        arch (str | dict): If a string, one of ``SpatialMamba.arch_settings``: 'tiny', 'small' or 'base'. If a dict, it
            has these two keys:

            - embed_dims (int): Even number of channels of the first stage; it doubles from stage to stage.
            - depths (Sequence[int]): Number of blocks of each stage.

            Defaults to 'tiny'.
        in_channels (int): Number of image channels. Defaults to 3.
        out_indices (Sequence[int] | int): Stages whose outputs are returned; negative ones count from the last. Stages
            after the last of them are not run and not trained. Defaults to (0, 1, 2, 3).
        drop_path_rate (float): Stochastic depth rate of the last block; it grows linearly from 0 over all blocks.
            Defaults to 0.2.
        norm_cfg (dict): Config of the normalisation in stem and downsampling layers. Defaults to ``dict(type='BN')``.
        frozen_stages (int): -1 freezes nothing, 0 the stem, n the stem and the first n stages, each with the
            downsampling layer that follows it and its output norm. Defaults to -1.
        norm_eval (bool): Whether BatchNorm layers stay in evaluation mode while training. Defaults to False.
        with_cp (bool): Whether to recompute stem, blocks and downsampling layers in the backward pass, each from its
            input alone, which saves memory and costs time (docs/large-inputs.md). Defaults to False.
        init_cfg (dict | list[dict], optional): Initialization config.
            ``dict(type='Pretrained', checkpoint=FILE_OR_URL)`` loads weights, 'ema://FILE_OR_URL' the averaged ones;
            with ``checkpoint=None`` it is the same as None: random weights. Beside ``checkpoint`` it may have these:

            - prefix (str): Prefix of the backbone in the file. Default: the only one there is.
            - map_location (str): As in :func:`torch.load`. Default: 'cpu'.
            - max_missing (int): How many tensors may be missing from the file, of another shape or left over.
              Default: 0.
            - allow_nan (bool): Whether NaN and infinite weights are taken. Default: False.
            - inflate_stem (bool): Whether the first convolution is fitted to another ``in_channels`` than the file's: 1
              gets the sum of the file's kernels, more get them in turn, scaled so that the activations keep their
              size. Default: False.

            Defaults to None.
        pretrained (str, optional): The same as ``init_cfg=dict(type='Pretrained', checkpoint=pretrained)``: mmseg sets
            it where a config has ``model.pretrained``. Defaults to None.

    Raises:
        ValueError: If ``arch``, ``out_indices`` or ``frozen_stages`` does not exist, or if both ``init_cfg`` and
            ``pretrained`` are given.

    Examples:
        >>> import torch
        >>> from mmspatialmamba.models import SpatialMamba
        >>> backbone = SpatialMamba(arch='tiny').eval()
        >>> for output in backbone(torch.rand(1, 3, 64, 96)):
        ...     print(tuple(output.shape))
        (1, 64, 16, 24)
        (1, 128, 8, 12)
        (1, 256, 4, 6)
        (1, 512, 2, 3)
    """

    arch_settings = {
        'tiny': {'embed_dims': 64, 'depths': (2, 4, 8, 4)},
        'small': {'embed_dims': 64, 'depths': (2, 4, 21, 5)},
        'base': {'embed_dims': 96, 'depths': (2, 4, 21, 5)},
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] | int = (0, 1, 2, 3),
        drop_path_rate: float = 0.2,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
    ) -> None:
        if isinstance(init_cfg, dict) and init_cfg.get('checkpoint', '') is None:
            init_cfg = None
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(f'{type(self).__name__}: set init_cfg or pretrained (now {pretrained!r}), not both')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg=init_cfg)
        embed_dims, self.depths = self._parse_arch(arch)
        self.in_channels = in_channels
        self.num_stages = len(self.depths)
        self.out_channels = tuple(embed_dims * 2**i for i in range(self.num_stages))
        self.out_indices = self._parse_out_indices(out_indices)
        if not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(f'SpatialMamba: frozen_stages must be -1 to {self.num_stages}, but is {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        # Imported late: mmcv.cnn loads mmcv._ext, which importing this package must not need.
        from mmcv.cnn import build_norm_layer
        from mmcv.cnn.bricks import DropPath

        def norm(channels):
            return build_norm_layer(norm_cfg, channels)[1]

        self.stem = Stem(in_channels, embed_dims, norm, with_cp)
        rates = iter(np.linspace(0, drop_path_rate, sum(self.depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(SpatialMambaBlock(channels, partial(DropPath, next(rates)), with_cp) for _ in range(depth)))
            for channels, depth in zip(self.out_channels, self.depths)
        )
        self.downsamples = nn.ModuleList(Downsample(channels, norm, with_cp) for channels in self.out_channels[:-1])
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(self.out_channels[i]))

        self._freeze()

    @classmethod
    def _parse_arch(cls, arch):
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                known = ', '.join(map(repr, cls.arch_settings))
                raise ValueError(f'SpatialMamba: arch must be one of {known} or a dict, but is {arch!r}')
            arch = cls.arch_settings[arch]
        if set(arch) != {'embed_dims', 'depths'}:
            raise ValueError(
                f"SpatialMamba: an arch dict has the keys 'embed_dims' and 'depths', but this has {sorted(arch)}"
            )
        if arch['embed_dims'] < 2 or arch['embed_dims'] % 2 or not arch['depths'] or min(arch['depths']) < 0:
            raise ValueError(
                'SpatialMamba: embed_dims must be positive and even and depths not empty nor negative, '
                f'but arch is {dict(arch)}'
            )
        return arch['embed_dims'], tuple(arch['depths'])

    def _parse_out_indices(self, out_indices):
        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not indices or any(not -self.num_stages <= i < self.num_stages for i in indices):
            raise ValueError(
                f'SpatialMamba: out_indices must name stages from 0 to {self.num_stages - 1}, but is {out_indices}'
            )
        return tuple(sorted({i % self.num_stages for i in indices}))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Rename keys of the original release and of earlier versions, and audit what ``read_checkpoint`` has read.

        A bare backbone takes its part, below 'backbone.', of a whole model's state dict. Metadata tell the file.
        """
        if not prefix and not any(key.startswith(('stem.', 'patch_embed.')) for key in state_dict):
            for key in [key for key in state_dict if key.startswith('backbone.')]:
                state_dict[key[len('backbone.') :]] = state_dict.pop(key)
        names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        last = self.num_stages - 1
        last_stage = last if is_upstream(names) and self.out_indices == (last,) else None
        for name in names:
            state_dict[prefix + from_upstream(name, last_stage)] = state_dict.pop(prefix + name)
        if SCOPE in local_metadata:
            self._audit(state_dict, prefix, local_metadata[SCOPE])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _audit(self, state_dict, prefix, note):
        """Refuse a file's weights that are not this backbone's; leave in ``state_dict`` what to load."""
        # Imported late: reading files needs much of mmengine, and building the backbone little.
        from mmspatialmamba.checkpoint import audit

        inside = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not prefix:
            # A whole model's file, of which a bare backbone takes its part.
            inside = {key: value for key, value in inside.items() if key.startswith((*self._modules, 'norm'))}
        options = "default_hooks=dict(load_audit=dict(type='LoadAuditHook'))"
        report = audit(inside, self, note['file'], options=options)
        for name in report.fresh:
            state_dict[prefix + name] = self.get_parameter(name)

    def _freeze(self):
        used = self.out_indices[-1] + 1
        idle = [*self.stages[used:], *self.downsamples[used - 1 :]]
        n = max(self.frozen_stages, 0)
        norms = [getattr(self, f'norm{i}') for i in self.out_indices if i < n]
        stem = [self.stem] if self.frozen_stages >= 0 else []
        for module in (*idle, *stem, *self.stages[:n], *self.downsamples[:n], *norms):
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True):
        """Set the mode, but keep frozen stages, and with ``norm_eval`` BatchNorm layers, in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self):
        """Load the weights that ``init_cfg`` names, or say that there are none.

        Raises:
            CheckpointError: If the file cannot be read, or does not hold what it should. Nothing is changed then.
            TypeError: If ``init_cfg`` has an unknown key.
        """
        configured = self.init_cfg
        configs = [configured] if isinstance(configured, dict) else list(configured or [])
        if not configs:
            print_log(
                f'{type(self).__name__}: no pretrained weights are configured, so training starts from scratch. Set '
                "the backbone's init_cfg=dict(type='Pretrained', checkpoint=FILE_OR_URL) to start from weights.",
                logger='current',
                level=logging.WARNING,
            )
        pretrained = [cfg for cfg in configs if type_name(cfg['type']) in _PRETRAINED]
        if pretrained and not self.is_init:
            loaders = [self._make_loader(**{k: v for k, v in cfg.items() if k != 'type'}) for cfg in pretrained]
            others = [cfg for cfg in configs if cfg not in pretrained]
            self.init_cfg = [*others, *(dict(type=loader) for loader in loaders)]
        super().init_weights()
        self.init_cfg = configured

    def _make_loader(self, checkpoint, **options):
        """Read and audit a file; the result is what mmengine's ``initialize`` builds an initializer from."""
        from mmengine.model.weight_init import update_init_info

        from mmspatialmamba.checkpoint import read_backbone

        known = list(inspect.signature(read_backbone).parameters)[1:]
        unknown = ', '.join(sorted(options.keys() - known))
        if unknown:
            raise TypeError(f"{type(self).__name__}: init_cfg of type 'Pretrained' takes {known}, but has {unknown}")
        report = read_backbone(self, checkpoint, **options)

        def load(backbone):
            backbone.load_state_dict(report.weights, strict=False)
            update_init_info(backbone, init_info=f'PretrainedInit: load from {checkpoint}')

        return lambda: load

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        The stem has depth 0, and each block one more than the block before. A downsampling layer has the depth of the
        block that follows, output norms and all outside the backbone the largest depth.

        Args:
            param_name (str): Name of the parameter in the model.
            prefix (str): Prefix of the backbone's parameters. Defaults to ''.

        Returns:
            tuple[int, int]: The depth, and the number of depths.
        """
        num_layers = sum(self.depths) + 2
        part, *indices = param_name[len(prefix) :].split('.') if param_name.startswith(prefix) else ('head',)
        if part == 'stem':
            depth = 0
        elif part == 'stages':
            depth = sum(self.depths[: int(indices[0])]) + int(indices[1]) + 1
        elif part == 'downsamples':
            depth = sum(self.depths[: int(indices[0]) + 1]) + 1
        else:
            depth = num_layers - 1
        return depth, num_layers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x (Tensor): Images, (batch, in_channels, H, W), any H, W >= 1.

        Returns:
            tuple[Tensor]: One contiguous (batch, embed_dims * 2^i, ceil(H / 2^(i+2)), ceil(W / 2^(i+2))) map for each
            stage i, counted from 0.
        """
        # As `contiguous(memory_format=torch.channels_last)`, which torch.vmap does not have.
        x = self.stem(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        outs = []
        for i in range(self.out_indices[-1] + 1):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = self.stages[i](x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x).contiguous())
        return tuple(outs)
