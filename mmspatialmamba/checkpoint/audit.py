"""Comparison of what a checkpoint holds with what a model needs, before anything is loaded."""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from itertools import accumulate, islice

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from rich.console import Console
from rich.table import Table
from torch import nn

from mmspatialmamba.registry import SCOPE

from .convert import below, find_backbones, is_classifier
from .errors import CheckpointError
from .reader import first_nonfinite, read_checkpoint

_STEM = 'stem.conv1.conv.weight'
_BLOCK = re.compile(r'.*?(?:stages\.\d+\.\d+|downsamples\.\d+)\.')
_ROWS = 30
_PROBLEMS = _MISSING, _RESHAPED, _LEFT_OVER = 'missing from the file', 'of another shape', "not in the model's backbone"
_UNUSED = 'not in the model'


@dataclass
class LoadReport:
    """Result of :func:`audit`. ``str()`` is one line, followed by a table where file and model differ.

    Args:
        source (str): Name of the checkpoint.
        weights (dict[str, Tensor]): What to load: the file's tensors that have a place, by the model's names.
        buffers (int): Number of buffers among them.
        differences (list[tuple[str, str, str, str]]): Each tensor that does not fit: its name, the problem, its shape
            in the file and its shape in the model, '' where it is not there.
        fresh (dict[str, str]): Tensors that keep the model's values on purpose, each with the name of its group.
    """

    source: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: int = 0
    differences: list[tuple[str, str, str, str]] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, list[str]]:
        """Names of the tensors that should be loaded and cannot be, by problem."""
        problems = {each: [name for name, problem, *_ in self.differences if problem == each] for each in _PROBLEMS}
        return {problem: names for problem, names in problems.items() if names}

    def __str__(self) -> str:
        loaded = f'{len(self.weights) - self.buffers} parameters and {self.buffers} buffers'
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
        return f'{line}\n{self._table()}' if self.differences else line

    def _table(self) -> str:
        rows = {}
        for name, problem, *shapes in self.differences:
            block = _BLOCK.match(name)
            key = name if block is None or problem == _RESHAPED else f'{block[0]}*'
            rows.setdefault((key, problem), []).append((name, *shapes))
        table = Table('tensor', 'problem', 'shape in the file', 'shape in the model')
        for (key, problem), tensors in islice(rows.items(), _ROWS):
            name, *shapes = tensors[0]
            if len(tensors) > 1:
                name, shapes = key, [shape and f'{len(tensors)} tensors' for shape in shapes]
            table.add_row(name, problem, *shapes)
        if len(rows) > _ROWS:
            table.add_row(f'and {len(rows) - _ROWS} rows more')
        console = Console(file=StringIO(), width=160)
        console.print(table)
        return console.file.getvalue().rstrip()


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
    """Infer the ``arch`` argument of the backbone below ``prefix`` from its weights; None if they do not tell."""
    names = below(state, prefix)
    blocks = {match.groups() for match in map(re.compile(r'stages\.(\d+)\.(\d+)\.').match, names) if match}
    width = state.get(f'{prefix}stem.conv3.1.norm.weight')
    if width is None or not blocks:
        return None
    depths = Counter(int(stage) for stage, _ in blocks)
    return {'embed_dims': len(width), 'depths': tuple(depths[i] for i in range(max(depths) + 1))}


def _remedy(report: LoadReport, state: Mapping, wanted: Mapping, prefix: str, options: str) -> str:
    """Say what to do about a checkpoint that does not fit."""
    if not report.weights:
        return f'name another file: none of its tensors is one of the model (first: {next(iter(state), None)})'
    archs = describe_arch(state, prefix), describe_arch(wanted, prefix)
    if None not in archs and archs[0] != archs[1]:
        texts = [', '.join(f'{key}={value}' for key, value in arch.items()) for arch in archs]
        return f"use a complete file of the model's arch, {texts[1]}; this one's is {texts[0]}"
    stem = prefix + _STEM
    if stem in report.problems.get(_RESHAPED, ()) and _differ_in_channels(state[stem], wanted[stem]):
        return (
            f'set inflate_stem=True in {options} to fit the first convolution, which has '
            f'{state[stem].shape[1]} image channels in the file, to in_channels={wanted[stem].shape[1]}'
        )
    return f"use this model's file, or set max_missing in {options} to allow it"


def _differ_in_channels(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two weights of a convolution differ in the number of input channels, and in no other size."""
    a, b = list(weight.shape), list(other.shape)
    return a != b and a[:1] + a[2:] == b[:1] + b[2:]


def pair(
    state: Mapping[str, torch.Tensor], module: nn.Module
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Pair the tensors of a state dict with those of the model that would load them. Loads nothing.

    Models rename, copy and drop tensors while they load. So mmengine loads the state dict, and a pre-hook at each
    module, its last, takes the module's tensors away. Pre-hooks are public since torch 2.5;
    ``_save_to_state_dict``, which tells a module's own names as state dicts have them, is not. Tried on torch 2.1 and
    2.14.

    Args:
        state (Mapping[str, Tensor]): The state dict.
        module (nn.Module): The model, or a wrapper of mmengine's around it.

    Returns:
        dict: By the model's names, a tensor of the state dict, None where it lacks one, and a tensor of the model, None
        where it has none of that name. What the model does not miss in the state dict is left out.
    """
    # A model may save its tensors by other names than its modules have.
    saved = get_state_dict(module, keep_vars=True)
    saved_names = {id(value): name for name, value in saved.items()}
    own, taken, seen, missing_keys, unexpected_keys = {}, {}, {}, (), ()

    def take(submodule, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        nonlocal missing_keys, unexpected_keys
        if not prefix:
            missing_keys, unexpected_keys = missing, unexpected
        local = {}
        submodule._save_to_state_dict(local, prefix, keep_vars=True)
        own.update(local)
        seen.update(state_dict)
        taken.update((name, state_dict.pop(name)) for name in local.keys() & state_dict.keys())

    loaded = OrderedDict(state)
    # Without the note of read_checkpoint, at which a backbone would audit.
    metadata = getattr(state, '_metadata', {})
    loaded._metadata = {key: {k: v for k, v in entry.items() if k != SCOPE} for key, entry in metadata.items()}
    handles = [each._register_load_state_dict_pre_hook(partial(take, each)) for each in module.modules()]
    try:
        load_state_dict(module, loaded, logger='silent')
    finally:
        for handle in handles:
            handle.remove()
    pairs, missing_keys = {}, set(missing_keys)
    for name, value in own.items():
        given = taken.get(name)
        # BatchNorm gives itself its own counter where the state dict has none.
        if given is not value and (given is not None or name in missing_keys):
            pairs[name if name in saved else saved_names.get(id(value), name)] = given, value
    return {**pairs, **{name: (seen[name], None) for name in unexpected_keys}}


def _group(name: str, prefixes: Sequence[str]) -> str:
    """Name the largest part of a model that a tensor is in and no backbone is."""
    parts = accumulate(name.split('.'), '{}.{}'.format)
    return next(part for part in parts if not any(prefix.startswith(part + '.') for prefix in prefixes))


def audit(
    state: Mapping[str, torch.Tensor],
    module: nn.Module,
    source: str,
    fresh: Sequence[str] = (),
    max_missing: int = 0,
    allow_nan: bool = False,
    inflate_stem: bool = False,
    options: str = "the backbone's init_cfg",
) -> LoadReport:
    """Compare a checkpoint with a model or a backbone, and log the report or refuse the checkpoint. Changes neither.

    From the checkpoint of a classifier, or of a self-supervised training, a model for another task takes the backbone
    alone, without its output norms unless the last stage's is the only one, as the original release does. What it does
    not take starts fresh.

    Args:
        state (Mapping[str, Tensor]): Tensors of the checkpoint, by our names.
        module (nn.Module): The model, or a backbone alone.
        source (str): Name of the checkpoint.
        fresh (Sequence[str]): Names, or beginnings of names up to a dot, of tensors that keep the model's values where
            the checkpoint has none of that shape. Defaults to ().
        max_missing (int): How many tensors may be missing, of another shape, or left over in the backbone. Defaults
            to 0.
        allow_nan (bool): Whether to take NaN and infinite weights. Defaults to False.
        inflate_stem (bool): Whether :func:`inflate` fits the first convolution to another number of image channels.
            Defaults to False.
        options (str): Where the user sets the options, for messages. Defaults to "the backbone's init_cfg".

    Returns:
        LoadReport: The comparison.

    Raises:
        CheckpointError: If the checkpoint does not hold what it should.
    """
    pairs = pair(state, module)
    wanted = {name: value for name, (_, value) in pairs.items() if value is not None}
    given = {name: value for name, (value, _) in pairs.items() if value is not None}
    # A model may load one backbone of the file into several of its own.
    backbones, held = find_backbones(wanted), find_backbones(state)
    prefixes = tuple(prefix for prefix in backbones if prefix in find_backbones(given)) or (*backbones, '')[:1]
    prefix = prefixes[0]
    shared = [name for name in given if name in wanted and not name.startswith(prefixes)]
    classifier = held and (is_classifier(state, held[0]) or not shared and is_classifier(below(state, held[0]), ''))
    state, report = given, LoadReport(source)
    if classifier and not is_classifier(wanted, prefix):
        state = {name: value for name, value in state.items() if name.startswith(prefixes)}
        report.fresh = {name: _group(name, prefixes) for name in wanted if not name.startswith(prefixes)}
        if not is_classifier(below(wanted, prefix), ''):
            norm = re.compile(rf'(?:{"|".join(map(re.escape, prefixes))})norm\d+\.')
            state = {name: value for name, value in state.items() if not norm.match(name)}
            report.fresh.update((name, 'output norms') for name in wanted if norm.match(name))
    for group in fresh:
        for name, value in wanted.items():
            chosen = name == group or name.startswith(group.rstrip('.') + '.')
            if chosen and (name not in state or state[name].shape != value.shape):
                report.fresh[name] = group
    state = {name: value for name, value in state.items() if name not in report.fresh}

    stems = [prefix + _STEM for prefix in prefixes]
    for name, value in wanted.items():
        given = state.get(name)
        if given is None:
            if name not in report.fresh and not name.endswith('num_batches_tracked'):
                report.differences.append((name, _MISSING, '', str(tuple(value.shape))))
            continue
        if inflate_stem and name in stems and _differ_in_channels(given, value):
            given = inflate(given, value.shape[1])
        if given.shape == value.shape:
            report.weights[name] = given
        else:
            report.differences.append((name, _RESHAPED, str(tuple(given.shape)), str(tuple(value.shape))))
    parts = tuple(prefix + part for prefix in prefixes for part in ('stem.', 'stages.', 'downsamples.'))
    for name, value in state.items():
        if name not in wanted:
            problem = _LEFT_OVER if name.startswith(parts) else _UNUSED
            report.differences.append((name, problem, str(tuple(getattr(value, 'shape', ()))), ''))
    report.buffers = sum(not isinstance(wanted[name], nn.Parameter) for name in report.weights)

    if sum(map(len, report.problems.values())) > max_missing:
        print_log(str(report), 'current', logging.WARNING)
        remedy = _remedy(report, state, wanted, prefix, options)
        raise CheckpointError(f'{str(report).splitlines()[0]}. What to do: {remedy}')
    nonfinite = first_nonfinite(report.weights)
    if nonfinite and not allow_nan:
        raise CheckpointError(
            f'{source}: {nonfinite} holds NaN or infinity: '
            f'use an earlier checkpoint, or set allow_nan=True in {options}'
        )
    print_log(str(report), 'current', logging.WARNING if report.differences else logging.INFO)
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
    options = dict(max_missing=max_missing, allow_nan=allow_nan, inflate_stem=inflate_stem)
    return audit(inside, backbone, checkpoint, **options)
