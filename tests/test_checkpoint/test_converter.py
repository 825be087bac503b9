"""tools/model_converters/upstream_to_mmspatialmamba.py, and the names it goes by."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from test_checkpoint.files import (
    BROKEN,
    backbone_state,
    classifier_state,
    published_classifier,
    same,
    small,
    write_broken,
)

from mmspatialmamba.checkpoint import CheckpointError, read_checkpoint
from mmspatialmamba.models.utils import from_upstream, to_upstream

SCRIPT = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'upstream_to_mmspatialmamba.py'
SPEC = importlib.util.spec_from_file_location('upstream_to_mmspatialmamba', SCRIPT)
converter = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(converter)

HEADS = {
    'det': {'neck.convs.0.weight': torch.ones(2, 2), 'rpn_head.rpn_cls.weight': torch.ones(3)},
    'seg': {'decode_head.conv_seg.weight': torch.ones(2, 2), 'auxiliary_head.conv_seg.weight': torch.ones(2)},
}


def original(task: str, **kwargs) -> dict:
    """A checkpoint as the original release publishes it for a task, without training state."""
    if task == 'cls':
        return {'model': classifier_state(**kwargs)}
    return {'state_dict': {**backbone_state(**kwargs), **HEADS[task]}}


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('part, last_stage', [('backbone', None), ('classifier', 3)])
def test_names_go_both_ways(keys, arch, part, last_stage):
    names = [name for name, _ in keys[f'{arch}_{part}'] if not name.startswith('head.')]
    ours = [from_upstream(name, last_stage) for name in names]
    assert len(set(ours)) == len(names)
    assert [to_upstream(name, last_stage) for name in ours] == names


@pytest.mark.parametrize('given', [True, False], ids=['task given', 'task found'])
@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_there_and_back(tmp_path, task, given):
    source, there, back = tmp_path / 'a.pth', tmp_path / 'new' / 'b.pth', tmp_path / 'c.pth'
    torch.save(original(task), source)
    task = task if given else None
    converter.write(converter.convert(str(source), task=task), there)
    converter.write(converter.convert(str(there), task=task, reverse=True), back)
    ours, again = torch.load(there), torch.load(back)
    [state], [expected] = again.values(), torch.load(source).values()
    assert again.keys() == torch.load(source).keys()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert value.dtype == state[name].dtype
        assert value.numpy().tobytes() == state[name].numpy().tobytes()
    model = small(out_indices=-1 if 'model' in again else (0, 1, 2, 3))
    names = {f'backbone.{name}' for name in model.state_dict()}
    assert {name for name in ours['state_dict'] if name.startswith('backbone.')} == names
    assert list(tmp_path.glob('**/tmp*')) == []


def test_what_is_written_holds_nothing_but_tensors_and_loads_without_the_package(tmp_path, monkeypatch, capsys):
    torch.save({**published_classifier(), 'meta': {'cfg': 'x'}}, tmp_path / 'a.pth')
    arguments = [SCRIPT.name, str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), '--task', 'cls']
    monkeypatch.setattr(sys, 'argv', arguments)
    assert converter.main() == 0
    printed = capsys.readouterr().out
    assert printed == f'{hashlib.sha256((tmp_path / "b.pth").read_bytes()).hexdigest()}  {tmp_path / "b.pth"}\n'
    torch.serialization.clear_safe_globals()
    try:
        loaded = torch.load(tmp_path / 'b.pth', weights_only=True)
    finally:
        from mmspatialmamba.checkpoint.safe_globals import allow_training_checkpoints

        allow_training_checkpoints()
    assert loaded.pop('meta') == {}
    assert [*loaded] == ['state_dict'] and all(type(value) is torch.Tensor for value in loaded['state_dict'].values())
    assert torch.equal(loaded['state_dict']['head.fc.weight'], classifier_state()['head.weight'])


def test_the_same_file_gives_the_same_bytes(tmp_path):
    torch.save(original('cls'), tmp_path / 'a.pth')
    checkpoint = converter.convert(str(tmp_path / 'a.pth'))
    assert converter.write(checkpoint, tmp_path / 'b.pth')[0] == converter.write(checkpoint, tmp_path / 'c.pth')[0]


def test_average(tmp_path):
    torch.save(published_classifier(), tmp_path / 'a.pth')
    state = converter.convert(str(tmp_path / 'a.pth'), ema=True)['state_dict']
    assert torch.equal(state['head.fc.weight'], classifier_state(seed=1)['head.weight'])
    torch.save(original('cls'), tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='holds no averaged weights'):
        converter.convert(str(tmp_path / 'b.pth'), ema=True)


def change(state: dict, name: str, value: torch.Tensor | None) -> dict:
    changed = {key: value if key == name else old for key, old in state.items()}
    if name not in changed:
        changed[name] = value
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    'task, claimed, name, value, says',
    [
        ('det', 'cls', None, None, 'backbone.outnorm0.weight, which has shape (8,)'),
        ('cls', 'det', None, None, 'head.weight, which has shape (10, 64)'),
        ('cls', 'seg', None, None, 'head.weight, which has shape (10, 64)'),
        ('seg', 'det', None, None, 'decode_head.conv_seg.weight, which has shape (2, 2)'),
        ('det', 'seg', None, None, 'rpn_head.rpn_cls.weight, which has shape (3,)'),
        ('cls', 'cls', 'head.bias', None, 'head.bias, which is missing'),
        ('cls', 'cls', 'layers.1.blocks.0.self_attention.Ds', None, 'blocks.0.self_attention.Ds, which is missing'),
        ('cls', 'cls', 'layers.1.blocks.0.self_attention.Ds', torch.ones(3), 'Ds, which has shape (3,)'),
        ('cls', 'cls', 'layers.1.blocks.0.attn.qkv', torch.ones(3), 'attn.qkv, which has shape (3,)'),
        ('det', 'det', 'backbone.outnorm2.bias', None, 'backbone.outnorm2.bias, which is missing'),
    ],
)
def test_the_first_wrong_key_is_named(tmp_path, task, claimed, name, value, says):
    checkpoint = original(task)
    [key] = checkpoint
    if name:
        checkpoint[key] = change(checkpoint[key], name, value)
    torch.save(checkpoint, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f'for task {claimed}: its first wrong key is ') as caught:
        converter.convert(str(tmp_path / 'a.pth'), task=claimed)
    assert str(caught.value).endswith(says)


def test_wrong_direction(tmp_path):
    torch.save(original('cls'), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="patch_embed.conv1.conv.weight is the original release's: leave out"):
        converter.convert(str(tmp_path / 'a.pth'), reverse=True)
    torch.save(converter.convert(str(tmp_path / 'a.pth')), tmp_path / 'b.pth')
    with pytest.raises(
        CheckpointError, match='stem.conv1.conv.weight is already ours: use --reverse, or publish_model.py'
    ):
        converter.convert(str(tmp_path / 'b.pth'))


@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files(tmp_path, kind):
    path = write_broken(kind, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        converter.convert(path)
    assert path in str(caught.value) and '\n' not in str(caught.value)
    assert not (tmp_path / 'witness').exists()


@pytest.mark.slow
def test_errors_are_one_line_and_write_nothing(tmp_path):
    (tmp_path / 'b.pth').write_bytes(b'before')
    result = run(write_broken('os.system', tmp_path), tmp_path / 'b.pth')
    assert result.returncode == 2 and result.stdout == ''
    [line] = [line for line in result.stderr.splitlines() if 'arning' not in line]
    assert line.startswith('upstream_to_mmspatialmamba.py: ') and 'refused' in line
    assert (tmp_path / 'b.pth').read_bytes() == b'before'
    assert not (tmp_path / 'witness').exists()


def test_what_cannot_be_written(tmp_path, monkeypatch):
    checkpoint = {'state_dict': OrderedDict(backbone_state()), 'meta': {}}
    with pytest.raises(CheckpointError, match='x.bin: DST must end in .pth or .safetensors'):
        converter.write(checkpoint, tmp_path / 'x.bin')
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError, match='cannot write .*/file/x.pth'):
        converter.write(checkpoint, tmp_path / 'file' / 'x.pth')

    def full(*args):
        raise OSError(28, os.strerror(28))

    (tmp_path / 'x.pth').write_bytes(b'before')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(CheckpointError, match='x.pth: No space left on device'):
        converter.write(checkpoint, tmp_path / 'x.pth')
    monkeypatch.undo()
    assert (tmp_path / 'x.pth').read_bytes() == b'before'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'x.pth']


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_safetensors(tmp_path, task):
    torch.save(original(task), tmp_path / 'a.pth')
    converter.write(converter.convert(str(tmp_path / 'a.pth')), tmp_path / 'b.safetensors')
    converter.write(converter.convert(str(tmp_path / 'b.safetensors'), reverse=True), tmp_path / 'c.safetensors')
    ours = read_checkpoint(str(tmp_path / 'b.safetensors'))['state_dict']
    assert same(ours, converter.convert(str(tmp_path / 'a.pth'))['state_dict'])
    [expected] = original(task).values()
    assert same(converter.fetch(str(tmp_path / 'c.safetensors'), None, ''), expected)
    assert same(read_checkpoint(str(tmp_path / 'c.safetensors'))['state_dict'], ours)
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'b.safetensors').read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='cut.safetensors is cut short or not a safetensors file'):
        read_checkpoint(str(tmp_path / 'cut.safetensors'))
