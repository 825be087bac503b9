"""Comparison of what a checkpoint holds with what a model needs, before anything is loaded."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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

_STEM = 'stem.conv1.conv.weight'
_BLOCK = re.compile(r'.*?(?:stages\.\d+\.\d+|downsamples\.\d+)\.')
_ROWS = 30


@dataclass
class LoadReport:
    """Result of :func:`audit`. ``str()`` is one line, followed by a table where file and model differ.

    Args:
        source (str): Name of the checkpoint.
        options (str): Where the user sets the options, for messages.
        weights (dict[str, Tensor]): What to load: the file's tensors that have a place, by the model's names.
        parameters (int): Number of parameters among them.
        buffers (int): Number of buffers among them.
        missing (dict[str, tuple]): Tensors that the file lacks, with the model's shape.
        unexpected (dict[str, tuple]): Tensors that the model has no place for, with the file's shape.
        mismatched (dict[str, tuple[tuple, tuple]]): Tensors of another shape: the file's, and the model's.
        fresh (dict[str, str]): Tensors that keep the model's values on purpose, each with the name of its group.
        left_over (list[str]): Those of ``unexpected`` that belong to a Spatial-Mamba backbone: the file is of another
            arch.
        nonfinite (str, optional): Name of the first tensor that holds NaN or infinity.
        hint (str): What to do, where file and model tell why they do not fit.
    """

    source: str
    options: str
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
        """Names of the tensors that should be loaded and cannot be, by problem."""
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
                if count:
                    rows.append(
                        (name, problem, *((str(shape), '') if tensors is self.unexpected else ('', str(shape))))
                    )
        table = Table('tensor', 'problem', 'shape in the file', 'shape in the model')
        for row in rows[:_ROWS]:
            table.add_row(*row)
        if len(rows) > _ROWS:
            table.add_row(f'and {len(rows) - _ROWS} rows more')
        console = Console(file=StringIO(), width=160)
        console.print(table)
        return console.file.getvalue().rstrip()

    def check(self, max_missing: int, allow_nan: bool) -> None:
        """Log the report, or refuse the checkpoint.

        Args:
            max_missing (int): How many tensors may be missing, of another shape, or left over in the backbone.
            allow_nan (bool): Whether to take NaN and infinite weights.

        Raises:
            CheckpointError: If more tensors are, or if a weight is NaN or infinite and may not be.
        """
        off = sum(map(len, self.problems.values()))
        if off > max_missing:
            print_log(str(self), 'current', logging.WARNING)
            remedy = self.hint or f"use this model's file, or set max_missing in {self.options} to allow it"
            raise CheckpointError(f'{str(self).splitlines()[0]}. What to do: {remedy}')
        if self.nonfinite and not allow_nan:
            raise CheckpointError(
                f'{self.source}: {self.nonfinite} holds NaN or infinity: '
                f'use an earlier checkpoint, or set allow_nan=True in {self.options}'
            )
        print_log(str(self), 'current', logging.WARNING if off or self.unexpected else logging.INFO)


def inflate(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """Fit the weight of the first convolution to another number of image channels.

    One channel gets the sum of the file's kernels. More channels get the kernels in turn, scaled by
    ``n / in_channels``, so that activations keep their size.

    Args:
        weight (Tensor): (out_channels, n, 3, 3).
        in_channels (int): Number of image channels of the model.

    Returns:
        Tensor: (out_channels, in_channels, 3, 3).
    """
    n = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_channels) % n] * (n / in_channels)


def describe_arch(state: Mapping[str, torch.Tensor], prefix: str) -> dict | None:
    """Infer a backbone's ``arch`` argument from its weights.

    Args:
        state (Mapping[str, Tensor]): Parameters and buffers, by our names.
        prefix (str): Prefix of the backbone.

    Returns:
        dict | None: ``embed_dims`` and ``depths``; None if the weights do not tell.
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
    classifier: bool | None = None,
    fresh: Sequence[str] = (),
    inflate_stem: bool = False,
    options: str = "the backbone's init_cfg",
) -> LoadReport:
    """Compare a checkpoint with a model or a backbone. Changes neither.

    From a classifier's checkpoint another model takes the backbone alone, without its output norms unless the last
    stage's is the only one, as the original release does. What it does not take starts fresh.

    Args:
        state (Mapping[str, Tensor]): Tensors of the checkpoint, by our names.
        module (nn.Module): The model, or a backbone alone.
        source (str): Name of the checkpoint.
        classifier (bool, optional): Whether the checkpoint is a classifier's. Defaults to None: found by its names.
        fresh (Sequence[str]): Names, or beginnings of names up to a dot, of tensors that keep the model's values where
            the checkpoint has none of that shape. Defaults to ().
        inflate_stem (bool): Whether :func:`inflate` fits the first convolution to another number of image channels.
            Defaults to False.
        options (str): Where the user sets the options, for messages. Defaults to "the backbone's init_cfg".

    Returns:
        LoadReport: The comparison.
    """
    wanted = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    prefix = next(iter(find_backbones(wanted)), '')
    report = LoadReport(source, options)
    if classifier is None:
        classifier = find_backbones(state) == [prefix] and is_classifier(state, prefix)
    if classifier and not is_classifier(wanted, prefix):
        state = {name: value for name, value in state.items() if name.startswith(prefix)}
        report.fresh = {name: name.split('.')[0] for name in wanted if not name.startswith(prefix)}
        if not is_classifier(below(wanted, prefix), ''):
            norm = re.compile(re.escape(prefix) + r'norm\d+\.')
            state = {name: value for name, value in state.items() if not norm.match(name)}
            report.fresh.update((name, 'output norms') for name in wanted if norm.match(name))
    for group in fresh:
        for name, value in wanted.items():
            chosen = name == group or name.startswith(group.rstrip('.') + '.')
            if chosen and (name not in state or state[name].shape != value.shape):
                report.fresh[name] = group
    state = {name: value for name, value in state.items() if name not in report.fresh}

    for name, value in wanted.items():
        if name in report.fresh:
            continue
        given, needed = state.get(name), tuple(value.shape)
        if given is None:
            if not name.endswith('num_batches_tracked'):
                report.missing[name] = needed
            continue
        have = tuple(given.shape)
        if name == prefix + _STEM and have != needed and have[:1] + have[2:] == needed[:1] + needed[2:]:
            if inflate_stem:
                given, have = inflate(given, needed[1]), needed
            else:
                report.hint = (
                    f'set inflate_stem=True in {options} to fit the first convolution, which has '
                    f'{have[1]} image channels in the file, to in_channels={needed[1]}'
                )
        if have != needed:
            report.mismatched[name] = have, needed
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
        allow_nan (bool): Whether to take NaN and infinite weights. Defaults to False.
        inflate_stem (bool): As in :func:`audit`. Defaults to False.

    Returns:
        LoadReport: What to load.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold what it should.
    """
    state = read_checkpoint(checkpoint, map_location)
    state = state.get('state_dict', state)
    prefixes = find_backbones(state)
    names = ', '.join(map(repr, prefixes))
    error = f'{checkpoint} holds no weights of a Spatial-Mamba backbone'
    if not prefixes:
        raise CheckpointError(f'{error} (first names: {", ".join(map(str, list(state)[:3]))}): name another file')
    if prefix is None and len(prefixes) > 1:
        raise CheckpointError(f'{checkpoint} holds several backbones: set prefix in init_cfg to one of {names}')
    prefix = prefixes[0] if prefix is None else prefix.rstrip('.') + '.'
    if prefix not in prefixes:
        raise CheckpointError(f'{error} below prefix {prefix!r}, but below {names}')
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    report = audit(inside, backbone, checkpoint, is_classifier(state, prefix), inflate_stem=inflate_stem)
    report.check(max_missing, allow_nan)
    return report
