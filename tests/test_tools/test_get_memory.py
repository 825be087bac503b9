from __future__ import annotations

import ctypes
import json
import mmap
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.utils import get_installed_path
from small_runs import run_script
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
    import memory_curve

    return SimpleNamespace(memory=get_memory, measuring=measuring, curve=memory_curve)


def arguments(config, shape=(64, 64), batch_size=None, training=False, cfg_options=None):
    return Namespace(
        config=config, shape=shape, batch_size=batch_size, training=training, device='cpu', cfg_options=cfg_options
    )


def get_memory(cwd, *args):
    return run_script(sys.executable, TOOLS / 'get_memory.py', *args, '--device', 'cpu', cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize('scope', DEMO)
@pytest.mark.parametrize('training', [False, True], ids=['prediction', 'training'])
def test_figures_of_the_demo_s_models(tools, scope, training):
    figures = tools.memory.measure(arguments(DEMO[scope], training=training))
    batch_size = Config.fromfile(DEMO[scope]).train_dataloader.batch_size
    assert figures['batch_size'] == (batch_size if training else 1)
    assert figures['parameters'] == figures['trained_parameters'] > 400_000
    assert figures['precision'] == 'float32'
    assert figures['peak_mib'] == pytest.approx(figures['before_mib'] + figures['rise_mib'])
    assert f'{figures["batch_size"]} x 3 x 64 x 64 (batch, channels, H, W)' in tools.memory.report(figures)


@pytest.mark.slow
@pytest.mark.parametrize('model', STOCK)
def test_models_of_the_libraries_train(tools, model):
    scope, name = STOCK[model]
    config = str(Path(get_installed_path(scope), '.mim', 'configs', name))
    # Else the model might run in what other tests of this process left behind, and nothing would rise.
    ctypes.CDLL(None).malloc_trim(0)
    figures = tools.memory.measure(arguments(config, (64, 96), batch_size=2, training=True))
    assert figures['shape'] == (64, 96) and figures['rise_mib'] > 0


def test_training_changes_the_weights(tools):
    cfg, scope = tools.memory.prepare(arguments(DEMO['mmdet'], batch_size=2))
    model = tools.memory.build(cfg, scope, 'cpu').train()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = tools.memory.build_optimizer(model, cfg, 'cpu')
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
    assert figures['batch_size'] == 2 and figures['parameters'] < 200_000


def test_stuff_map_has_bands_of_the_last_classes(tools):
    data = tools.memory.stuff_map(53, (10, 4), first=80).data
    assert data.shape == (1, 10, 4)
    assert data[0, :, 0].tolist() == [80, 80, 81, 81, 82, 82, 83, 83, 84, 84]
    assert tools.memory.stuff_map(2, (4, 1)).data.flatten().tolist() == [0, 0, 1, 1]


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
def test_training_holds_gradients_and_averages(tmp_path):
    out = tmp_path / 'figures.json'
    result = get_memory(tmp_path, DEMO['mmpretrain'], '--shape', 64, 64, '--training', '--out', out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures['rise_mib'] > 12 * figures['parameters'] / 2**20


@pytest.mark.slow
def test_command_line(tmp_path):
    sizes = {}
    for side in (512, 1024):
        out = tmp_path / f'{side}.json'
        result = get_memory(tmp_path, DEMO['mmpretrain'], '--shape', side, side, '--batch-size', 2, '--out', out)
        assert result.returncode == 0, result.stderr
        sizes[side] = json.loads(out.read_text())['rise_mib']
        lines = result.stdout.splitlines()[-6:]
        assert [line.split(':')[0] for line in lines] == [
            'config', 'measured', 'input', 'parameters', 'peak memory', 'time'
        ]  # fmt: skip
        assert lines[2].split(': ')[1].strip() == f'2 x 3 x {side} x {side} (batch, channels, H, W)'
        assert lines[4].split(': ')[1].strip().startswith(f'{sizes[side]:.0f} MiB above the ')
    assert sizes[1024] == pytest.approx(4 * sizes[512], rel=0.25)


@pytest.mark.parametrize(
    'args, message',
    [
        (['none.py'], 'get_memory.py: there is no config file none.py'),
        (['empty.py'], 'get_memory.py: config empty.py sets no default_scope'),
        (['x.py', '--shape', '0', '64'], 'get_memory.py: error: --shape must be positive, but is 0 64'),
        (['x.py', '--batch-size', '-1'], 'get_memory.py: error: --batch-size must be positive, but is -1'),
        ([CLASSIFIER, '--cfg-options', 'model.backbone.arch.depths=1,1'], 'get_memory.py: --cfg-options do not fit'),
    ],
    ids=['config', 'scope', 'shape', 'batch-size', 'cfg-options'],
)
def test_mistakes_are_told_in_one_line(tools, tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / 'empty.py').write_text('model = dict()')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['get_memory.py', *args])
    try:
        status = tools.memory.main()
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_too_little_memory_is_told_in_one_line(tools, monkeypatch, capsys):
    def measure(args):
        torch.empty(2**60, dtype=torch.uint8)

    args = arguments('config.py', (8192, 8192), batch_size=4)
    monkeypatch.setattr(tools.memory, 'parse_args', lambda: args)
    monkeypatch.setattr(tools.memory, 'measure', measure)
    assert tools.memory.main() == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert error.startswith('get_memory.py: 4 x 8192 x 8192 needs more memory than there is: use a smaller --shape')


def test_fit_tells_linear_from_quadratic(tools):
    figures = {size: dict(rise_mib=100 * size**2 / 2**20) for size in (512, 1024, 2048)}
    fit = tools.curve.fit(figures)
    assert fit['exponent'] == pytest.approx(1) and fit['bytes_per_pixel'] == pytest.approx(100)
    assert fit['largest_error'] < 1e-6
    figures = {size: dict(rise_mib=size**4 / 2**32) for size in (512, 1024, 2048)}
    fit = tools.curve.fit(figures)
    assert fit['exponent'] == pytest.approx(2) and fit['largest_error'] > 0.1


def test_curve_stops_at_the_limit(tools, monkeypatch, capsys):
    asked = []

    def measure(args, series, size):
        asked.append(size)
        return dict(rise_mib=size**2 / 2**10, seconds=1.0)

    monkeypatch.setattr(tools.curve, 'measure', measure)
    figures = tools.curve.measure_series(Namespace(training_sizes=[512, 2048, 1024], limit=2), 'training')
    assert list(figures) == asked == [512, 1024]
    assert 'training: not at 2048x2048, which would take 4 GiB; the limit is 2' in capsys.readouterr().out


def test_curve_is_drawn(tools, tmp_path):
    series = {'inference': {s: dict(rise_mib=s**2 / 2**10) for s in (512, 1024)}, 'training': {512: dict(rise_mib=900)}}
    record = dict(series=series, fits={'inference': tools.curve.fit(series['inference'])}, machine=dict(device='CPU'))
    figure = Figure()
    tools.curve.draw(figure, record)
    figure.savefig(tmp_path / 'curve.png')
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ['inference: 1024 bytes a pixel', 'training', 'proportional to pixels']


@pytest.mark.slow
def test_memory_curve(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.curve, 'SERIES', {'inference': {}, 'training': dict(frozen_stages=2, with_cp=True)})
    command = ['memory_curve.py', '--config', DEMO['mmpretrain'], '--out', str(tmp_path)]
    command += ['--sizes', '128', '64', '--training-sizes', '128', '64', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', command)
    tools.curve.main()
    (file,) = tmp_path.glob('memory_*.json')
    record = json.loads(file.read_text())
    assert file.with_suffix('.png').is_file()
    for series, figures in record['series'].items():
        assert list(figures) == ['64', '128']
        for one in figures.values():
            assert one['task'] == ('training' if series == 'training' else 'prediction')
            assert (one['trained_parameters'] < one['parameters']) == (series == 'training')
