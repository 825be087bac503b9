"""Names of the original Spatial-Mamba release, and ours for the same parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The original release's name, and ours; {n} is a number, ^ and $ are the ends of a name. They are applied in this
# order, and undone in the opposite one.
_PAIRS = (
    ('^patch_embed.', '^stem.'),
    ('^layers.{n}.blocks.', '^stages.{n}.'),
    ('^layers.{n}.downsample.conv.', '^downsamples.{n}.'),
    ('^outnorm{n}.', '^norm{n}.'),
    ('.self_attention.', '.mixer.'),
    ('.ln_1.', '.mixer.ln.'),
    ('.ln_2.', '.mlp.ln.'),
    ('.mixer.conv2d.', '.mixer.conv.'),
    ('.mixer.x_proj_weight$', '.mixer.x_proj.weight$'),
    ('.mixer.dt_projs_weight$', '.mixer.dt_proj.weight$'),
    ('.mixer.dt_projs_bias$', '.mixer.dt_bias$'),
    ('.mixer.A_logs$', '.mixer.A_log$'),
    ('.mixer.Ds$', '.mixer.D$'),
    ('.mixer.state_fusion.kernel_3$', '.mixer.fusion_kernels.0$'),
    ('.mixer.state_fusion.kernel_3_1$', '.mixer.fusion_kernels.1$'),
    ('.mixer.state_fusion.kernel_3_2$', '.mixer.fusion_kernels.2$'),
    ('.mixer.state_fusion.alpha$', '.mixer.fusion_alpha$'),
)


def _rename(source: str, target: str) -> tuple[re.Pattern, str]:
    """The regular expression and the replacement that turn one half of a pair into the other."""
    return re.compile(source.replace('.', r'\.').replace('{n}', r'(\d+)')), target.strip('^$').replace('{n}', r'\1')


# Names of this package's version 0.1.
_EARLIER = (('.ln1.', '.mixer.ln.'), ('.ln2.', '.mlp.ln.'))
_RENAMES = tuple(_rename(theirs, ours) for theirs, ours in (*_PAIRS, *_EARLIER))
_RENAMES_BACK = tuple(_rename(ours, theirs) for theirs, ours in reversed(_PAIRS))


def is_upstream(names: Iterable[str]) -> bool:
    """Whether any of a backbone's parameter names is one that only the original release uses."""
    return any(name.startswith(('patch_embed.', 'layers.')) for name in names)


def from_upstream(name: str, last_stage: int | None = None) -> str:
    """Translate an upstream backbone parameter's or buffer's name to ours.

    Args:
        name (str): Name relative to the backbone, as in the original release or an earlier version of this package.
        last_stage (int, optional): Index of the stage whose output norm the classifier's ``norm`` is. Defaults to None,
            which leaves ``norm`` as it is.

    Returns:
        str: Name relative to our backbone; a name that neither has is returned as it is.
    """
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name if last_stage is None else re.sub(r'^norm\.', f'norm{last_stage}.', name)


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
