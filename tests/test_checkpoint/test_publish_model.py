"""tools/model_converters/publish_model.py."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import publish_model
import pytest
import torch
from test_checkpoint.files import BROKEN, published_classifier, same, small, write_broken
from test_checkpoint.test_audit import NAMES, rename
from test_checkpoint.test_refusals import Model, make_runner, run

from mmspatialmamba.checkpoint import CheckpointError, allow_training_checkpoints, read_checkpoint


def publish(monkeypatch, capsys, *args) -> Path:
    monkeypatch.setattr(sys, 'argv', ['publish_model.py', *map(str, args)])
    assert publish_model.main() == 0
    digest, path = capsys.readouterr().out.split()
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    assert Path(path).stem.endswith(f'-{digest[:8]}')
    return Path(path)


@pytest.mark.parametrize('options', [(), ('--no-ema',)], ids=['average', 'raw weights'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', [str, *NAMES.values()], ids=['ours', *NAMES])
def test_a_training_checkpoint(trained, tmp_path, monkeypatch, capsys, options, suffix, name):
    source, model, average = trained
    torch.save(rename(torch.load(source, weights_only=True), name), tmp_path / 'trained.pth')
    path = publish(monkeypatch, capsys, tmp_path / 'trained.pth', tmp_path / 'new' / f'name{suffix}', *options)
    assert list((tmp_path / 'new').iterdir()) == [path]
    assert (path.name[:5], path.suffix) == ('name-', suffix)
    expected = (model if options else average.module).state_dict()
    assert same(read_checkpoint(str(path))['state_dict'], expected)
    found = Model()
    run(make_runner(found, tmp_path, load_from=str(path)))
    assert same(found.state_dict(), expected)
    backbone = small(out_indices=-1, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    backbone.init_weights()
    assert same(backbone.state_dict(), found.backbone.state_dict())


def test_it_holds_weights_alone_and_loads_without_the_package(trained, tmp_path, monkeypatch, capsys):
    path = publish(monkeypatch, capsys, trained[0], tmp_path / 'name.pth')
    assert publish(monkeypatch, capsys, trained[0], tmp_path / 'name.pth') == path
    torch.serialization.clear_safe_globals()
    try:
        checkpoint = torch.load(path, weights_only=True)
    finally:
        allow_training_checkpoints()
    assert checkpoint.keys() == {'state_dict', 'meta'}
    assert checkpoint['meta'] == {'dataset_meta': {'classes': ('a', 'b')}}
    assert {type(value) for value in checkpoint['state_dict'].values()} == {torch.Tensor}


def test_a_file_without_an_average_and_one_of_the_original_release(tmp_path):
    state = Model().state_dict()
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'a.pth')
    for ema in (True, False):
        assert same(publish_model.publish(str(tmp_path / 'a.pth'), ema)['state_dict'], state)
    torch.save(published_classifier(), tmp_path / 'b.pth')
    assert publish_model.publish(str(tmp_path / 'b.pth'))['state_dict'].keys() == state.keys()


@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files(tmp_path, kind):
    path = write_broken(kind, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        publish_model.publish(path)
    assert path in str(caught.value) and '\n' not in str(caught.value)
    assert not (tmp_path / 'witness').exists()


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    torch.save({'state_dict': {'fc.weight': torch.ones(1)}}, tmp_path / 'a.pth')
    for arguments, says in (
        (('a.pth', 'b.pth'), 'holds no weights of Spatial-Mamba'),
        (('c.pth', 'b.pth'), 'there is no'),
    ):
        monkeypatch.setattr(sys, 'argv', ['publish_model.py', *(str(tmp_path / name) for name in arguments)])
        assert publish_model.main() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith('publish_model.py: ') and says in line
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']
