from __future__ import annotations

import ctypes
import json
import mmap
import sys
from argparse import Namespace
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.utils import get_installed_path
from torch import nn

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools' / 'analysis_tools'
DEMO = {
    'mmdet': 'mask-rcnn_spatialmamba-pico_fpn_photo-digits',
    'mmseg': 'spatialmamba-pico_upernet_photo-digits',
    'mmpretrain': 'spatialmamba-pico_photo-digits',
}
DEMO = {scope: str(ROOT / 'configs' / 'demo' / f'{name}.py') for scope, name in DEMO.items()}
CLASSIFIER = str(ROOT / 'configs' / 'classification' / 'spatialmamba-tiny_8xb128_in1k.py')
STOCK = {
    'retinanet': ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
    'panoptic': ('mmdet', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'),
    'semantic-fpn': ('mmseg', 'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'),
    'segformer': ('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
}


@pytest.fixture
def tools(monkeypatch):
    """The tools' modules."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import get_memory
    import measuring

    return SimpleNamespace(memory=get_memory, measuring=measuring)


def arguments(config, shape=(64, 64), batch_size=None, training=False, cfg_options=None):
    options = cfg_options or {}
    return Namespace(
        config=config, shape=shape, batch_size=batch_size, training=training, device='cpu', cfg_options=options
    )


def run(tools, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['get_memory.py', *map(str, args), '--device', 'cpu'])
    return tools.memory.main()


@pytest.mark.slow
@pytest.mark.parametrize('scope', DEMO)
@pytest.mark.parametrize('training', [False, True], ids=['prediction', 'training'])
def test_figures_of_the_demo_s_models(tools, scope, training):
    figures = tools.memory.measure(arguments(DEMO[scope], training=training))
    batch_size = Config.fromfile(DEMO[scope]).train_dataloader.batch_size
    assert figures['batch, channels, H, W'] == [batch_size if training else 1, 3, 64, 64]
    assert figures['parameters'] == figures['trained parameters'] > 400_000
    assert figures['precision'] == 'float32'


@pytest.mark.slow
@pytest.mark.parametrize('model', STOCK)
def test_models_of_the_libraries_train(tools, model):
    scope, name = STOCK[model]
    config = str(Path(get_installed_path(scope), '.mim', 'configs', name))
    # Else the model might run in what other tests of this process left behind, and nothing would rise.
    ctypes.CDLL(None).malloc_trim(0)
    figures = tools.memory.measure(arguments(config, (64, 96), batch_size=2, training=True))
    assert figures['batch, channels, H, W'][2:] == [64, 96] and figures[tools.memory.RISE] > 0


def test_training_changes_the_weights(tools):
    cfg, scope = tools.memory.prepare(arguments(DEMO['mmdet'], batch_size=2))
    model = tools.memory.build(cfg, scope, 'cpu').train()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    model.train_step(tools.memory.make_batch(model, scope, 3, 2, (64, 64)), optimizer)
    assert not any(torch.equal(p, old) for p, old in zip(model.roi_head.mask_head.parameters(), before))


def test_padded_sizes_become_the_shape(tools):
    path = Path(get_installed_path('mmdet'), '.mim', 'configs', STOCK['panoptic'][1])
    cfg, _ = tools.memory.prepare(arguments(str(path), (96, 64)))
    assert tuple(cfg.model.data_preprocessor.batch_augments[0].size) == (96, 64)
    cfg, _ = tools.memory.prepare(arguments(DEMO['mmseg'], (48, 64)))
    assert tuple(cfg.model.data_preprocessor.size) == (48, 64)


def test_mixed_precision_is_float32_on_the_cpu(tools):
    options = dict(arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1)))
    options = {'model.backbone': options, 'model.head.in_channels': 64, 'train_dataloader.batch_size': 2}
    figures = tools.memory.measure(arguments(CLASSIFIER, training=True, cfg_options=options))
    assert figures['precision'] == "float32, not the config's mixed precision, which needs a GPU"
    assert figures['batch, channels, H, W'][0] == 2 and figures['parameters'] < 200_000


def test_sync_bn_becomes_bn(tools):
    cfg, scope = tools.memory.prepare(
        arguments(DEMO['mmseg'], cfg_options={'model.decode_head.norm_cfg.type': 'SyncBN'})
    )
    model = tools.memory.build(cfg, scope, 'cpu')
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
def test_peak_memory_is_since_the_reset(tools):
    size = 2**26
    before = tools.measuring.reset_peak_memory('cpu')
    # Not by malloc, which may reuse what other tests freed.
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        held = tools.measuring.peak_memory('cpu') - before
    assert held == pytest.approx(size, rel=0.1)
    assert tools.measuring.peak_memory('cpu') - before == pytest.approx(held, rel=0.1)
    assert tools.measuring.reset_peak_memory('cpu') - before < held / 2
    assert tools.measuring.peak_memory('cpu') - before < held / 2


@pytest.mark.slow
def test_figures_are_printed_and_written(tools, tmp_path, monkeypatch, capfd):
    assert run(tools, monkeypatch, DEMO['mmpretrain'], '--shape', 64, 64, '--training', '--out', tmp_path) == 0
    (file,) = tmp_path.glob('memory_*.json')
    figures = json.loads(file.read_text())
    # The gradients and AdamW's two averages.
    assert figures[tools.memory.RISE] > 12 * figures['parameters'] / 2**20
    assert f'{tools.memory.RISE}'.ljust(20) in capfd.readouterr().out


@pytest.mark.slow
def test_memory_grows_with_the_image(tools, monkeypatch):
    cases = [arguments(DEMO['mmpretrain'], (side, side), batch_size=2) for side in (512, 1024)]
    small, large = (tools.measuring.in_fresh_process(tools.memory.measure, case)[tools.memory.RISE] for case in cases)
    assert large == pytest.approx(4 * small, rel=0.25)


@pytest.mark.parametrize(
    'args, message',
    [
        (['none.py'], 'get_memory.py: there is no config file none.py'),
        (['empty.py'], 'get_memory.py: config empty.py '),
        (['x.py', '--shape', '0', '64'], "get_memory.py: error: argument --shape: '0' is no positive integer"),
        (['x.py', '--batch-size', '-1'], "get_memory.py: error: argument --batch-size: '-1' is no positive integer"),
        ([CLASSIFIER, '--cfg-options', 'model.backbone.arch.depths=1,1'], 'get_memory.py: --cfg-options do not fit'),
    ],
    ids=['config', 'scope', 'shape', 'batch-size', 'cfg-options'],
)
def test_mistakes_are_told_in_one_line(tools, tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / 'empty.py').write_text('model = dict()')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tools.measuring, 'in_fresh_process', lambda function, args: function(args))
    try:
        status = run(tools, monkeypatch, *args)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def too_much_memory(function, args):
    torch.empty(2**60, dtype=torch.uint8)


def killed(function, args):
    raise BrokenProcessPool('A process in the process pool was terminated abruptly')


@pytest.mark.parametrize('measure', [too_much_memory, killed])
def test_too_little_memory_is_told_in_one_line(tools, monkeypatch, capsys, measure):
    monkeypatch.setattr(tools.measuring, 'in_fresh_process', measure)
    assert run(tools, monkeypatch, 'config.py') == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert error.startswith('get_memory.py: there is too little memory: use smaller images or batches (')


def test_fit_tells_linear_from_quadratic(tools):
    fit = tools.memory.fit({size: 100 * size**2 / 2**20 for size in (512, 1024, 2048)})
    assert fit['exponent'] == pytest.approx(1) and fit['bytes_per_pixel'] == pytest.approx(100)
    assert fit['largest_error'] < 1e-6
    fit = tools.memory.fit({size: size**4 / 2**32 for size in (512, 1024, 2048)})
    assert fit['exponent'] == pytest.approx(2) and fit['largest_error'] > 0.1


def test_curves_stop_at_the_limit(tools, tmp_path, monkeypatch, capsys):
    asked = []

    def in_fresh_process(function, args):
        assert function is tools.memory.measure and args.cfg_options['model.backbone.out_indices'] == (0, 1, 2, 3)
        asked.append((args.training, args.cfg_options.get('model.backbone.with_cp', False), args.shape))
        return {tools.memory.RISE: args.shape[0] ** 2 / 2**10, 'seconds': 1.0}

    monkeypatch.setattr(tools.measuring, 'in_fresh_process', in_fresh_process)
    monkeypatch.setattr(tools.memory, 'SERIES', {'inference': {}, 'training, with_cp': dict(with_cp=True)})
    command = ['some.py', '--curve', '--sizes', 1024, 512, 2048, '--limit', 2, '--out', tmp_path]
    assert run(tools, monkeypatch, *command) == 0
    sizes = [(512, 512), (1024, 1024)]
    assert asked == [(False, False, size) for size in sizes] + [(True, True, size) for size in sizes]
    assert 'inference: not at 2048x2048, which would take 4 GiB; the limit is 2' in capsys.readouterr().out
    (file,) = tmp_path.glob('memory_*.json')
    record = json.loads(file.read_text())
    assert record['fits']['inference']['bytes_per_pixel'] == pytest.approx(1024)
    assert file.with_suffix('.png').is_file()
