"""Compares what a checkpoint holds with what a model needs, before anything is loaded."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO

import torch
from mmengine.logging import print_log
from rich.console import Console
from rich.table import Table
from torch import nn

from .convert import below, find_backbones, is_classifier
from .errors import CheckpointError
from .reader import first_nonfinite, read_checkpoint

_OUTPUT_NORM = re.compile(r'norm\d+\.')
_STEM = 'stem.conv1.conv.weight'
_BLOCK = re.compile(r'.*?(?:stages\.\d+\.\d+|downsamples\.\d+)\.')
_ROWS = 30


@dataclass
class LoadReport:
    """What a checkpoint gives to a model; ``str()`` is one line if that is all it should, else that line and a table.

    Args:
        source (str): The checkpoint's name.
        weights (dict[str, Tensor]): What to load: the file's tensors that have a place, by the model's names.
        parameters (int): How many of them are parameters.
        buffers (int): How many of them are buffers.
        missing (dict[str, tuple]): Tensors the file should hold and doesn't, with the model's shape.
        unexpected (dict[str, tuple]): Tensors the model has no place for, with the file's shape.
        mismatched (dict[str, tuple[tuple, tuple]]): Tensors of another shape: the file's, and the model's.
        fresh (dict[str, str]): Tensors that keep the model's values on purpose, each with the name of its group.
        left_over (list[str]): Those of ``unexpected`` that belong to a Spatial-Mamba backbone, which tell that the file
            is of another arch.
        nonfinite (str, optional): The first tensor with NaN or infinity.
        hint (str): What to do where file and model tell why they don't fit.
    """

    source: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: int = 0
    buffers: int = 0
    missing: dict[str, tuple] = field(default_factory=dict)
    unexpected: dict[str, tuple] = field(default_factory=dict)
    mismatched: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    nonfinite: str | None = None
    hint: str = ''

    @property
    def problems(self) -> dict[str, list[str]]:
        """Names of the tensors that should have been loaded and can't be, by what is wrong."""
        problems = {
            'missing from the file': list(self.missing),
            'of another shape': list(self.mismatched),
            "not in the model's backbone": self.left_over,
        }
        return {problem: names for problem, names in problems.items() if names}

    def __str__(self) -> str:
        loaded = f'{self.parameters} parameters and {self.buffers} buffers'
        counts = ', '.join(f'{len(names)} {what} (first: {names[0]})' for what, names in self.problems.items())
        if counts:
            line = f'{self.source} does not fit the model, tensors: {counts}; {loaded} fit'
        else:
            line = f'all {loaded} that {self.source} should hold were loaded'
        groups = Counter(self.fresh.values())
        # Each output norm has a weight and a bias.
        norms = groups.pop('output norms', 0) // 2
        names = [f'{norms} output norm{"s" * (norms > 1)}'] * bool(norms) + list(groups)
        line += f'; fresh: {", ".join(names)}' if names else ''
        return f'{line}\n{self._table()}' if counts or self.unexpected else line

    def _table(self) -> str:
        rows = [(name, 'another shape', *map(str, shapes)) for name, shapes in self.mismatched.items()]
        for tensors, problem in ((self.missing, 'missing from the file'), (self.unexpected, 'not in the model')):
            blocks = Counter(match[0] for match in map(_BLOCK.match, tensors) if match)
            for name, shape in tensors.items():
                match = _BLOCK.match(name)
                count = blocks.pop(match[0], 0) if match else 1
                if count > 1:
                    name, shape = f'{match[0]}*', f'{count} tensors'
                elif match and count == 0:
                    continue
                sides = (str(shape), '') if tensors is self.unexpected else ('', str(shape))
                rows.append((name, problem, *sides))
        table = Table('tensor', 'problem', 'shape in the file', 'shape in the model')
        for row in rows[:_ROWS]:
            table.add_row(*row)
        if len(rows) > _ROWS:
            table.add_row(f'and {len(rows) - _ROWS} rows more')
        console = Console(file=StringIO(), width=160)
        console.print(table)
        return console.file.getvalue().rstrip()

    def check(self, max_missing: int, allow_nan: bool, options: str) -> None:
        """Log the report, or refuse the checkpoint.

        Args:
            max_missing (int): How many tensors may be missing, of another shape or left over in the backbone.
            allow_nan (bool): Whether NaN and infinite weights are taken.
            options (str): Where the user sets these two, for the message.

        Raises:
            CheckpointError: If more are, or if weights are NaN or infinite and may not be.
        """
        off = sum(map(len, self.problems.values()))
        if off > max_missing:
            print_log(str(self), 'current', logging.WARNING)
            remedy = self.hint or f"use this model's file, or set max_missing in {options} to allow it"
            raise CheckpointError(f'{str(self).splitlines()[0]}. What to do: {remedy}')
        if self.nonfinite and not allow_nan:
            raise CheckpointError(
                f'{self.source}: {self.nonfinite} holds NaN or infinity: '
                f'use an earlier checkpoint, or set allow_nan=True in {options}'
            )
        print_log(str(self), 'current', logging.WARNING if off or self.unexpected else logging.INFO)


def inflate(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """Fit the first convolution's weight to another number of image channels.

    One channel gets the sum of the file's kernels; more get them in turn, scaled by ``n / in_channels``, so that the
    activations keep their size.

    Args:
        weight (Tensor): (out_channels, n, 3, 3).
        in_channels (int): The model's number of image channels.

    Returns:
        Tensor: (out_channels, in_channels, 3, 3).
    """
    n = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_channels) % n] * (n / in_channels)


def describe_arch(state: Mapping[str, torch.Tensor], prefix: str) -> dict | None:
    """The ``arch`` argument of the backbone with these weights.

    Args:
        state (Mapping[str, Tensor]): Parameters and buffers, by our names.
        prefix (str): The backbone's prefix.

    Returns:
        dict | None: ``embed_dims`` and ``depths``; None if the weights don't tell.
    """
    names = below(state, prefix)
    blocks = {match.groups() for match in map(re.compile(r'stages\.(\d+)\.(\d+)\.').match, names) if match}
    width = state.get(f'{prefix}stem.conv3.1.norm.weight')
    if width is None or not blocks:
        return None
    depths = Counter(int(stage) for stage, _ in blocks)
    return {'embed_dims': len(width), 'depths': tuple(depths[i] for i in range(max(depths) + 1))}


def audit(
    state: Mapping[str, torch.Tensor],
    module: nn.Module,
    source: str,
    prefix: str = '',
    fresh: Mapping[str, str] | None = None,
    inflate_stem: bool = False,
    options: str = 'init_cfg',
) -> LoadReport:
    """Compare a state dict with what a module needs. Changes neither.

    Args:
        state (Mapping[str, Tensor]): The checkpoint's tensors, by the module's names.
        module (nn.Module): The module.
        source (str): The checkpoint's name.
        prefix (str): Prefix of the Spatial-Mamba backbone in the module. Defaults to ''.
        fresh (Mapping[str, str], optional): Names of tensors that keep the module's values, whatever the checkpoint
            holds, each with the name of its group. Defaults to None: there are none.
        inflate_stem (bool): Whether the first convolution is fitted to another number of image channels, as
            :func:`inflate` does. Defaults to False.
        options (str): Where the user sets the options, for the messages. Defaults to 'init_cfg'.

    Returns:
        LoadReport: The comparison.
    """
    wanted = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    report = LoadReport(source, fresh=dict(fresh or {}))
    for name, value in wanted.items():
        if name in report.fresh:
            continue
        given, shape = state.get(name), tuple(value.shape)
        if given is None:
            if not name.endswith('num_batches_tracked'):
                report.missing[name] = shape
            continue
        if name == prefix + _STEM and (given.shape[0], *given.shape[2:]) == (shape[0], *shape[2:]):
            if given.shape[1] != shape[1] and inflate_stem:
                given = inflate(given, shape[1])
            elif given.shape[1] != shape[1]:
                report.hint = (
                    f'set inflate_stem=True in {options} to fit the first convolution, which has '
                    f'{given.shape[1]} image channels in the file, to in_channels={shape[1]}'
                )
        if given.shape != value.shape:
            report.mismatched[name] = tuple(given.shape), shape
            continue
        report.weights[name] = given
        report.parameters += name in parameters
        report.buffers += name not in parameters
    report.unexpected = {
        name: tuple(getattr(value, 'shape', ())) for name, value in state.items() if name not in wanted
    }
    backbone = re.compile(re.escape(prefix) + r'(stem|stages|downsamples)\.')
    report.left_over = [name for name in report.unexpected if backbone.match(name)]
    report.nonfinite = first_nonfinite(report.weights)
    archs = describe_arch(state, prefix), describe_arch(wanted, prefix)
    if not report.weights:
        report.hint = f'name another file: none of its tensors is one of the model (first: {next(iter(state), None)})'
    elif None not in archs and archs[0] != archs[1]:
        texts = [', '.join(f'{key}={value}' for key, value in arch.items()) for arch in archs]
        report.hint = f"use a complete file of the model's arch, {texts[1]}; this one's is {texts[0]}"
    return report


def _without_output_norms(state: Mapping, wanted: Mapping, prefix: str) -> tuple[Mapping, dict[str, str]]:
    """Take the output norms from a classifier's weights, unless they are for a classifier's backbone too.

    Args:
        state (Mapping[str, Tensor]): The classifier's tensors.
        wanted (Mapping[str, Tensor]): The model's tensors.
        prefix (str): The backbone's prefix in both.

    Returns:
        tuple[Mapping[str, Tensor], dict[str, str]]: What is left of ``state``, and which of the model's start fresh.
    """
    if is_classifier(below(wanted, prefix), ''):
        return state, {}
    norm = re.compile(re.escape(prefix) + _OUTPUT_NORM.pattern)
    kept = {name: value for name, value in state.items() if not norm.match(name)}
    return kept, {name: 'output norms' for name in wanted if norm.match(name)}


def audit_backbone(
    state: Mapping[str, torch.Tensor],
    backbone: nn.Module,
    source: str,
    classifier: bool,
    inflate_stem: bool = False,
    options: str = "the backbone's init_cfg",
) -> LoadReport:
    """Compare a backbone's part of a checkpoint with a backbone.

    The output norms start fresh where a dense-prediction backbone gets a classifier's weights, as upstream's do.

    Args:
        state (Mapping[str, Tensor]): The checkpoint's tensors, by the backbone's names.
        backbone (nn.Module): The backbone.
        source (str): The checkpoint's name.
        classifier (bool): Whether the checkpoint is a classifier's.
        inflate_stem (bool): As in :func:`audit`. Defaults to False.
        options (str): As in :func:`audit`. Defaults to "the backbone's init_cfg".

    Returns:
        LoadReport: The comparison.
    """
    fresh = {}
    if classifier:
        state, fresh = _without_output_norms(state, backbone.state_dict(), '')
    return audit(state, backbone, source, fresh=fresh, inflate_stem=inflate_stem, options=options)


def audit_model(
    state: Mapping[str, torch.Tensor],
    model: nn.Module,
    source: str,
    fresh: tuple[str, ...] = (),
    inflate_stem: bool = False,
    options: str = 'default_hooks.load_audit',
) -> LoadReport:
    """Compare a whole checkpoint with a whole model.

    Heads, neck and output norms start fresh where another model than a classifier gets a classifier's weights.

    Args:
        state (Mapping[str, Tensor]): The checkpoint's tensors, by our names.
        model (nn.Module): The model.
        source (str): The checkpoint's name.
        fresh (tuple[str, ...]): Names, or the beginnings of names up to a dot, of tensors that may keep the model's
            values where the checkpoint has none of that shape. Defaults to ().
        inflate_stem (bool): As in :func:`audit`. Defaults to False.
        options (str): As in :func:`audit`. Defaults to 'default_hooks.load_audit'.

    Returns:
        LoadReport: The comparison.
    """
    wanted, kept = model.state_dict(), {}
    prefix = next(iter(find_backbones(wanted)), '')
    if find_backbones(state) == [prefix] and is_classifier(state, prefix) and not is_classifier(wanted, prefix):
        kept = {name: name.split('.')[0] for name in wanted if not name.startswith(prefix)}
        state = {name: value for name, value in state.items() if name.startswith(prefix)}
        state, norms = _without_output_norms(state, wanted, prefix)
        kept.update(norms)
    for beginning in fresh:
        for name, value in wanted.items():
            chosen = name == beginning or name.startswith(beginning.rstrip('.') + '.')
            if chosen and (name not in state or state[name].shape != value.shape):
                kept[name] = beginning
        state = {name: value for name, value in state.items() if name not in kept}
    return audit(state, model, source, prefix, kept, inflate_stem, options)


def read_backbone(
    backbone: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    map_location: str = 'cpu',
    max_missing: int = 0,
    allow_nan: bool = False,
    inflate_stem: bool = False,
) -> LoadReport:
    """Read a checkpoint for a backbone and audit it. Changes nothing.

    Args:
        backbone (nn.Module): The backbone.
        checkpoint (str): File or URL, as in :func:`read_checkpoint`.
        prefix (str, optional): Prefix of the backbone in the file. Defaults to None: the only one there is.
        map_location (str): As in :func:`torch.load`. Defaults to 'cpu'.
        max_missing (int): How many tensors may be missing, of another shape or left over. Defaults to 0.
        allow_nan (bool): Whether NaN and infinite weights are taken. Defaults to False.
        inflate_stem (bool): As in :func:`audit`. Defaults to False.

    Returns:
        LoadReport: What to load.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold what it should.
    """
    loaded = read_checkpoint(checkpoint, map_location)
    state = loaded.get('state_dict', loaded)
    prefixes = find_backbones(state)
    if prefix is not None:
        prefix = prefix.rstrip('.') + '.'
    elif len(prefixes) == 1:
        prefix = prefixes[0]
    if not prefixes or prefix not in prefixes:
        names = ', '.join(repr(name) for name in prefixes)
        raise CheckpointError(
            f'{checkpoint} holds no weights of a Spatial-Mamba backbone'
            + (f' below prefix {prefix!r}, but below {names}' if prefix and names else '')
            + (f': it holds several, set prefix in init_cfg to one of {names}' if names and not prefix else '')
            + ('' if names else f' (first names: {", ".join(map(str, list(state)[:3]))}): name another file')
        )
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    report = audit_backbone(inside, backbone, checkpoint, is_classifier(state, prefix), inflate_stem)
    report.check(max_missing, allow_nan, "the backbone's init_cfg")
    return report
