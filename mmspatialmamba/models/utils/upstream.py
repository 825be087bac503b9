"""Names of the original Spatial-Mamba release, and ours for the same parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

_STARTS = ('patch_embed.', 'layers.')

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'^patch_embed\.', 'stem.'),
        (r'^layers\.(\d+)\.blocks\.', r'stages.\1.'),
        (r'^layers\.(\d+)\.downsample\.conv\.', r'downsamples.\1.'),
        (r'^outnorm(\d+)\.', r'norm\1.'),
        (r'\.ln_([12])\.', r'.ln\1.'),
        (r'\.self_attention\.', '.mixer.'),
        (r'\.mixer\.conv2d\.', '.mixer.conv.'),
        (r'\.mixer\.x_proj_weight$', '.mixer.x_proj.weight'),
        (r'\.mixer\.dt_projs_weight$', '.mixer.dt_proj.weight'),
        (r'\.mixer\.dt_projs_bias$', '.mixer.dt_bias'),
        (r'\.mixer\.A_logs$', '.mixer.A_log'),
        (r'\.mixer\.Ds$', '.mixer.D'),
        (r'\.mixer\.state_fusion\.kernel_3$', '.mixer.fusion_kernels.0'),
        (r'\.mixer\.state_fusion\.kernel_3_1$', '.mixer.fusion_kernels.1'),
        (r'\.mixer\.state_fusion\.kernel_3_2$', '.mixer.fusion_kernels.2'),
        (r'\.mixer\.state_fusion\.alpha$', '.mixer.fusion_alpha'),
    )
)

_RENAMES_BACK = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'\.mixer\.fusion_alpha$', '.mixer.state_fusion.alpha'),
        (r'\.mixer\.fusion_kernels\.2$', '.mixer.state_fusion.kernel_3_2'),
        (r'\.mixer\.fusion_kernels\.1$', '.mixer.state_fusion.kernel_3_1'),
        (r'\.mixer\.fusion_kernels\.0$', '.mixer.state_fusion.kernel_3'),
        (r'\.mixer\.D$', '.mixer.Ds'),
        (r'\.mixer\.A_log$', '.mixer.A_logs'),
        (r'\.mixer\.dt_bias$', '.mixer.dt_projs_bias'),
        (r'\.mixer\.dt_proj\.weight$', '.mixer.dt_projs_weight'),
        (r'\.mixer\.x_proj\.weight$', '.mixer.x_proj_weight'),
        (r'\.mixer\.conv\.', '.mixer.conv2d.'),
        (r'\.mixer\.', '.self_attention.'),
        (r'\.ln([12])\.', r'.ln_\1.'),
        (r'^norm(\d+)\.', r'outnorm\1.'),
        (r'^downsamples\.(\d+)\.', r'layers.\1.downsample.conv.'),
        (r'^stages\.(\d+)\.', r'layers.\1.blocks.'),
        (r'^stem\.', 'patch_embed.'),
    )
)


def is_upstream(names: Iterable[str]) -> bool:
    """Whether any of a backbone's parameter names is one that only the original release uses."""
    return any(name.startswith(_STARTS) for name in names)


def from_upstream(name: str, last_stage: int | None = None) -> str:
    """Our name of an upstream backbone parameter or buffer.

    Args:
        name (str): Name relative to the backbone, as in the original release.
        last_stage (int, optional): Index of the stage whose output norm the classifier's ``norm`` is. Defaults to None,
            which leaves ``norm`` as it is.

    Returns:
        str: Name relative to our backbone; a name that upstream's backbone doesn't have is returned as it is.
    """
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    if last_stage is not None and name.startswith('norm.'):
        name = f'norm{last_stage}.' + name[len('norm.') :]
    return name


def to_upstream(name: str, last_stage: int | None = None) -> str:
    """The original release's name of one of our backbone's parameters or buffers: undoes :func:`from_upstream`.

    Args:
        name (str): Name relative to our backbone.
        last_stage (int, optional): Index of the stage whose output norm is the classifier's ``norm``. Defaults to None:
            a dense-prediction backbone, whose norms are ``outnorm0``, ``outnorm1`` and so on.

    Returns:
        str: Name relative to upstream's backbone; a name that our backbone doesn't have is returned as it is.
    """
    if last_stage is not None and name.startswith(f'norm{last_stage}.'):
        return name.replace(str(last_stage), '', 1)
    for pattern, replacement in _RENAMES_BACK:
        name = pattern.sub(replacement, name)
    return name
