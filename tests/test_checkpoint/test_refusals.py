"""Broken and hostile files, through every way a checkpoint gets into a model."""

from __future__ import annotations

import pickle
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from test_checkpoint.files import (
    ARCH,
    BROKEN,
    classifier_state,
    published_classifier,
    same,
    small,
    snapshot,
    write_broken,
)
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError, read_checkpoint, register_checkpoint_loaders
from mmspatialmamba.models import MM_SpatialMamba


class Model(BaseModel):
    """A model with our backbone and a head, as a classifier has them."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = small(out_indices=-1, **kwargs)
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, 10)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.head.fc(self.backbone(inputs)[0].mean((2, 3)))


def make_runner(model, work_dir, hook=True, **kwargs) -> Runner:
    hooks = dict(load_audit=dict(type='LoadAuditHook')) if hook else None
    return Runner(
        model, str(work_dir), default_hooks=hooks, experiment_name=f'runner{len(MMLogger._instance_dict)}', **kwargs
    )


def by_init_cfg(path, work_dir):
    backbone = small(out_indices=-1, init_cfg=dict(type='Pretrained', checkpoint=path))
    return backbone, backbone.init_weights


def by_pretrained(path, work_dir):
    backbone = MM_SpatialMamba(dims=8, depths=ARCH['depths'], pretrained=path)
    return backbone, backbone.init_weights


def run(runner):
    """What the runner's ``train``, ``val`` and ``test`` do first."""
    runner.call_hook('before_run')
    runner.load_or_resume()


def by_load_from(path, work_dir):
    model = Model()
    return model, partial(run, make_runner(model, work_dir, load_from=path))


def by_resume(path, work_dir):
    model = Model()
    return model, partial(run, make_runner(model, work_dir, load_from=path, resume=True))


def by_resume_of_the_last(path, work_dir):
    work_dir.mkdir()
    (work_dir / 'last_checkpoint').write_text(path)
    model = Model()
    return model, partial(run, make_runner(model, work_dir, resume=True))


def by_runner_without_hook(path, work_dir):
    register_checkpoint_loaders()
    model = Model()
    return model, partial(run, make_runner(model, work_dir, hook=False, load_from=path))


def by_load_checkpoint(path, work_dir):
    register_checkpoint_loaders()
    model = Model()
    return model, partial(load_checkpoint, model, path)


def by_ema(path, work_dir):
    model = Model()
    return model, partial(load_checkpoint, model, f'ema://{path}')


PATHS = [by_init_cfg, by_pretrained, by_load_from, by_resume, by_runner_without_hook, by_load_checkpoint]
# Every kind of file through the three loaders that differ, and a few through what is built on them.
CASES = [(kind, way) for way in (by_init_cfg, by_load_from, by_load_checkpoint) for kind in BROKEN]
CASES += [
    (kind, way)
    for way in (by_pretrained, by_resume, by_resume_of_the_last, by_runner_without_hook)
    for kind in ('missing', 'truncated', 'os.system', 'nan')
]


@pytest.mark.parametrize('kind, way', CASES, ids=[f'{kind}-{way.__name__}' for kind, way in CASES])
def test_broken_files_are_refused_in_one_line(tmp_path, kind, way):
    path = write_broken(kind, tmp_path)
    module, load = way(path, tmp_path / 'work')
    before = snapshot(module)
    with pytest.raises(CheckpointError, match=BROKEN[kind]) as caught:
        load()
    assert path in str(caught.value)
    assert '\n' not in str(caught.value)
    assert same(snapshot(module), before)
    assert not (tmp_path / 'witness').exists()


@pytest.mark.parametrize('kind', [kind for kind in BROKEN if kind not in ('nan', 'infinite')])
def test_broken_averages_are_refused(tmp_path, kind):
    with pytest.raises(CheckpointError):
        read_checkpoint('ema://' + write_broken(kind, tmp_path))
    assert not (tmp_path / 'witness').exists()


def test_the_hostile_files_would_do_harm_otherwise(tmp_path):
    for kind in ('os.system', 'legacy-os.system', 'in-weights'):
        torch.load(write_broken(kind, tmp_path), weights_only=False)
        (tmp_path / 'witness').unlink()


@pytest.mark.parametrize('seed', range(20))
def test_damaged_bytes_give_one_line(tmp_path, seed):
    path = tmp_path / 'x.pth'
    torch.save(
        {'model': classifier_state(dict(embed_dims=2, depths=(1,)))}, path, _use_new_zipfile_serialization=seed % 2
    )
    data = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for position in torch.randint(0, min(len(data), 4000), (20,), generator=generator).tolist():
        data[position] = int(torch.randint(0, 256, (), generator=generator))
    path.write_bytes(data)
    try:
        assert isinstance(read_checkpoint(str(path)), dict)
    except CheckpointError as error:
        assert str(path) in str(error) and '\n' not in str(error)


@pytest.mark.parametrize('way', PATHS, ids=lambda way: way.__name__)
def test_another_networks_weights_are_refused(tmp_path, way):
    path = str(tmp_path / 'resnet.pth')
    torch.save({'state_dict': nn.Sequential(nn.Linear(2, 2)).state_dict()}, path)
    module, load = way(path, tmp_path / 'work')
    before = snapshot(module)
    with pytest.raises(CheckpointError, match='resnet.pth (does not fit|holds no weights of a Spatial-Mamba)'):
        load()
    assert same(snapshot(module), before)


def test_the_hook_reads_its_runs_file_and_no_other(tmp_path):
    hostile = write_broken('os.system', tmp_path)
    torch.save(published_classifier(), tmp_path / 'good.pth')
    _, load = by_load_from(str(tmp_path / 'good.pth'), tmp_path / 'work')
    load()
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(hostile)


def test_the_hook_reads_the_files_of_a_moved_work_dir(tmp_path):
    hostile = write_broken('os.system', tmp_path)
    (tmp_path / 'last_checkpoint').write_text('old/place/os.system.pth')
    make_runner(Model(), tmp_path, resume=True).call_hook('before_run')
    with pytest.raises(CheckpointError, match='refused'):
        CheckpointLoader.load_checkpoint(hostile)


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if not self.path.startswith('/cut'):
            return super().do_GET()
        data = (self.server.folder / 'good.pth').read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server of the files in ``tmp_path``, with torch's cache beside them."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    torch.save(published_classifier(), tmp_path / 'good.pth')
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(tmp_path))) as http:
        http.folder = tmp_path
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http.server_port}'
        http.shutdown()


def cached(tmp_path):
    return [path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_urls_load_and_are_cached(server, tmp_path):
    backbone = small(out_indices=-1, init_cfg=dict(type='Pretrained', checkpoint=f'{server}/good.pth'))
    backbone.init_weights()
    assert torch.equal(backbone.norm3.bias.data, classifier_state()['norm.bias'])
    assert cached(tmp_path) == ['good.pth']
    (tmp_path / 'good.pth').unlink()
    state = read_checkpoint(f'ema://{server}/good.pth')['state_dict']
    assert torch.equal(state['backbone.norm3.bias'], classifier_state(seed=1)['norm.bias'])


@pytest.mark.parametrize(
    'name, reason',
    [
        ('nothing.pth', r'HTTP 404 \(File not found\)'),
        ('cut.pth', 'cut short or not a PyTorch checkpoint'),
        ('os.system.pth', 'refused: loading it would run .*system'),
    ],
    ids=['404', 'cut-off', 'hostile'],
)
@pytest.mark.parametrize('way', [by_init_cfg, by_load_from, by_load_checkpoint], ids=lambda way: way.__name__)
def test_urls_that_fail_leave_nothing(server, tmp_path, name, reason, way):
    write_broken('os.system', tmp_path)
    module, load = way(f'{server}/{name}', tmp_path / 'work')
    before = snapshot(module)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load()
    assert name in str(caught.value) and '\n' not in str(caught.value)
    assert same(snapshot(module), before)
    assert cached(tmp_path) == []
    assert not (tmp_path / 'witness').exists()


def test_unreachable_host(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    with pytest.raises(CheckpointError, match='cannot download http://127.0.0.1:9/x.pth: .*refused.*check the URL'):
        read_checkpoint('http://127.0.0.1:9/x.pth')
    assert cached(tmp_path) == []


def test_safetensors_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    (tmp_path / 'x.safetensors').write_bytes(b'x')
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_checkpoint(str(tmp_path / 'x.safetensors'))
