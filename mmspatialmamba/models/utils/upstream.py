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
