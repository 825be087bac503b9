from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import modelindex
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path

ROOT = Path(__file__).parents[1]
FOLDERS = ('classification', 'detection', 'segmentation')
GENERATE = Path('tools', 'misc', 'generate_readme.py')
CLASSIFIER = 'spatialmamba-tiny_8xb128_in1k'
DETECTOR = 'mask-rcnn_spatialmamba-tiny_fpn_1x_coco'
SEGMENTOR = 'spatialmamba-tiny_upernet_8xb2-160k_ade20k-512x512'
# name: millions of parameters (classifiers: all of them), multiply-adds in G, metrics
PUBLISHED = {
    'spatialmamba-tiny_8xb128_in1k': (26.748862, 4.47, {'Top 1 Accuracy': 83.5}),
    'spatialmamba-small_8xb128_in1k': (43.07428, 7.12, {'Top 1 Accuracy': 84.6}),
    'spatialmamba-base_8xb128_in1k': (95.745592, 15.8, {'Top 1 Accuracy': 85.3}),
    'mask-rcnn_spatialmamba-tiny_fpn_1x_coco': (46, 261, {'box AP': 47.6, 'mask AP': 42.9}),
    'mask-rcnn_spatialmamba-small_fpn_1x_coco': (63, 315, {'box AP': 49.2, 'mask AP': 44.0}),
    'mask-rcnn_spatialmamba-base_fpn_1x_coco': (115, 494, {'box AP': 50.4, 'mask AP': 45.1}),
    'mask-rcnn_spatialmamba-tiny_fpn_ms-crop-3x_coco': (46, 261, {'box AP': 49.3, 'mask AP': 43.6}),
    'mask-rcnn_spatialmamba-small_fpn_ms-crop-3x_coco': (63, 315, {'box AP': 50.5, 'mask AP': 44.6}),
    'spatialmamba-tiny_upernet_8xb2-160k_ade20k-512x512': (57, 936, {'mIoU': 48.6, 'mIoU(ms+flip)': 49.4}),
    'spatialmamba-small_upernet_8xb2-160k_ade20k-512x512': (73, 992, {'mIoU': 50.6, 'mIoU(ms+flip)': 51.4}),
    'spatialmamba-base_upernet_8xb2-160k_ade20k-512x512': (127, 1176, {'mIoU': 51.8, 'mIoU(ms+flip)': 52.6}),
}
CONFIGS = {path.stem: path for folder in FOLDERS for path in sorted((ROOT / 'configs' / folder).glob('*.py'))}


@pytest.fixture(scope='module')
def models():
    """The models as modelindex, and so ``mim search``, reads them from the installed package."""
    index = modelindex.load(os.path.join(get_installed_path('mmspatialmamba'), '.mim', 'model-index.yml'))
    assert [error for error in index.check(silent=True) if 'Path to README' not in error] == []
    assert [model.name for model in index.models if model.check_errors] == []
    return {model.name: model for model in index.models}


@pytest.fixture(scope='module')
def apis():
    return importlib.import_module('mmspatialmamba.apis')


def run_generator(root, *options):
    """Run the generator of ``root``: its exit code, and what it printed."""
    command = [sys.executable, str(root / GENERATE), *options]
    result = subprocess.run(command, cwd=os.sep, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def zoo(tmp_path):
    """A copy of the configs and the generator, to change."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    (tmp_path / GENERATE).parent.mkdir(parents=True)
    shutil.copy(ROOT / GENERATE, tmp_path / GENERATE)
    return tmp_path


def test_every_config_has_an_entry_and_every_entry_a_config(models):
    assert set(models) == set(CONFIGS)
    for name, model in models.items():
        assert model.config == CONFIGS[name].relative_to(ROOT).as_posix()


def test_results_are_the_published_ones(models):
    assert {name for name, model in models.items() if model.results} == set(PUBLISHED)
    for name, (parameters, multiply_adds, metrics) in PUBLISHED.items():
        model = models[name]
        found = {key: value for result in model.results for key, value in result.metrics.items()}
        assert found == metrics, name
        assert {result.dataset for result in model.results} == {model.metadata.data['Training Data']}
        assert model.metadata.data['Parameters'] == round(parameters * 1e6), name
        assert model.metadata.data['FLOPs'] == round(multiply_adds * 1e9), name
        assert model.data['Converted From']['Weights'].startswith('https://github.com/EdwardChasel/Spatial-Mamba')


def test_collection_tells_paper_code_and_readme(models):
    for model in models.values():
        full = model.full_model
        assert full.paper['URL'] == 'https://arxiv.org/abs/2410.15091'
        assert full.code['URL'] == 'https://github.com/EdwardChasel/Spatial-Mamba'
        assert (ROOT / full.readme).is_file()


@pytest.mark.parametrize('name', CONFIGS)
def test_entry_tells_the_configs_schedule(models, name):
    metadata = models[name].metadata.data
    cfg = Config.fromfile(str(CONFIGS[name]))
    assert metadata.get('Epochs') == cfg.train_cfg.get('max_epochs')
    assert metadata.get('Iterations') == cfg.train_cfg.get('max_iters')
    processes = re.search(r'_(\d+)xb', name)
    assert metadata['Batch Size'] == int(processes[1] if processes else 8) * cfg.train_dataloader.batch_size
    assert metadata['Architecture'] and metadata['Training Techniques']


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name.endswith('in1k')])
def test_classifiers_have_the_parameters_their_entry_says(models, name):
    cfg = Config.fromfile(str(CONFIGS[name]))
    init_default_scope('mmpretrain')
    with torch.device('meta'):
        model = importlib.import_module('mmpretrain.registry').MODELS.build(cfg.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == models[name].metadata.data['Parameters']


def test_readmes_are_up_to_date():
    assert run_generator(ROOT, '--check') == (0, 'every README is up to date\n')


def test_stale_readme_is_named_and_generated_again(zoo):
    metafile = zoo / 'configs' / 'detection' / 'metafile.yml'
    metafile.write_text(metafile.read_text().replace('box AP: 47.6', 'box AP: 47.7'))
    readme = zoo / 'configs' / 'detection' / 'README.md'
    before = readme.read_text()
    code, said = run_generator(zoo, '--check')
    assert code == 1 and said.count('\n') == 1
    assert 'configs/detection/README.md' in said and 'python tools/misc/generate_readme.py' in said
    assert 'classification' not in said and readme.read_text() == before
    assert run_generator(zoo) == (0, 'written: configs/detection/README.md\n')
    assert readme.read_text() == before.replace('| 47.6 |', '| 47.7 |')
    assert run_generator(zoo, '--check')[0] == 0


def test_model_without_results_is_not_trained_yet(zoo):
    with (zoo / 'configs' / 'segmentation' / 'metafile.yml').open('a') as metafile:
        metafile.write(
            '  - Name: new_model\n'
            '    In Collection: Spatial-Mamba\n'
            '    Config: configs/segmentation/new_model.py\n'
            '    Metadata:\n'
            '      Training Data: New\n'
        )
    assert run_generator(zoo)[0] == 0
    section = (zoo / 'configs' / 'segmentation' / 'README.md').read_text().split('### New\n\n')[1]
    head, _, row = section.splitlines()[:3]
    assert (
        head == '| model | schedule | parameters | multiply-adds | training memory | mIoU | mIoU(ms+flip) | weights |'
    )
    assert row == '| [new_model](new_model.py) | - | - | - | - | not trained yet | - | - |'


@pytest.mark.parametrize(
    'file, old, new, said',
    [
        ('metafile.yml', '      Training Data: COCO\n', '', f'model {DETECTOR} lacks Training Data'),
        ('metafile.yml', f'    Config: configs/detection/{DETECTOR}.py\n', '', f'model {DETECTOR} lacks Config'),
        ('metafile.yml', 'Models:', 'Models: [', 'line'),
        ('README.md', '<!-- End of the tables -->\n', '', 'lacks the lines'),
    ],
    ids=['no data set', 'no config', 'no YAML', 'no place for tables'],
)
def test_bad_file_is_one_clear_line(zoo, file, old, new, said):
    path, readme = (zoo / 'configs' / 'detection' / name for name in (file, 'README.md'))
    path.write_text(path.read_text().replace(old, new, 1))
    before = readme.read_text()
    code, output = run_generator(zoo)
    assert code == 1 and output.count('\n') == 1
    assert output.startswith(f'configs/detection/{file}') and said in output
    assert readme.read_text() == before


@pytest.mark.parametrize('name', [CLASSIFIER, DETECTOR, SEGMENTOR])
def test_mmengine_hub_gives_the_config(name):
    cfg = get_config(f'mmspatialmamba::{CONFIGS[name].parent.name}/{name}.py')
    assert cfg.model == Config.fromfile(str(CONFIGS[name])).model


def test_mmpretrain_lists_the_classifiers(apis):
    from mmpretrain import list_models

    names = sorted(name for name, path in CONFIGS.items() if path.parent.name == 'classification')
    assert list_models('*spatialmamba*') == names
    assert 'resnet50_8xb32_in1k' in list_models('resnet50*')


@pytest.mark.slow
def test_mmpretrain_builds_and_infers_by_name(apis, tmp_path):
    from mmpretrain import get_model, inference_model

    model = get_model(CLASSIFIER)
    assert sum(parameter.numel() for parameter in model.parameters()) == 26748862
    with torch.no_grad():
        model.head.fc.bias[7] += 100
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    loaded = get_model(CLASSIFIER, pretrained=str(tmp_path / 'weights.pth'))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    result = inference_model(loaded, image)
    assert result['pred_label'] == 7 and result['pred_class'] == 'cock'
    again = inference_model(CLASSIFIER, image, pretrained=str(tmp_path / 'weights.pth'))
    np.testing.assert_allclose(again['pred_scores'], result['pred_scores'])


@pytest.mark.parametrize('function', ['get_model', 'inference_model'])
def test_weights_nobody_published_are_an_error(apis, function):
    import mmpretrain

    call = {
        'get_model': lambda: mmpretrain.get_model(CLASSIFIER, pretrained=True),
        'inference_model': lambda: mmpretrain.inference_model(CLASSIFIER, np.zeros((32, 32, 3), np.uint8)),
    }[function]
    with pytest.raises(FileNotFoundError) as info:
        call()
    said = str(info.value)
    assert '\n' not in said and said.startswith(f'{CLASSIFIER} has no weights to download')
    assert 'github.com/EdwardChasel/Spatial-Mamba' in said and said.endswith('pretrained=FILE')


@pytest.mark.parametrize(
    'library, inferencer, name',
    [('mmdet', 'DetInferencer', DETECTOR), ('mmseg', 'MMSegInferencer', SEGMENTOR)],
    ids=['mmdet', 'mmseg'],
)
class TestInferencers:
    """Images are wide and low, since the test pipelines enlarge them: to 1344x32 and to 2048x32."""

    def test_without_weights_is_an_error(self, apis, library, inferencer, name):
        build = getattr(importlib.import_module(f'{library}.apis'), inferencer)
        with pytest.raises(FileNotFoundError, match=f'{name} has no weights to download: .*weights=FILE'):
            build(name, device='cpu')

    @pytest.mark.slow
    def test_loads_and_predicts_by_name(self, apis, library, inferencer, name, tmp_path):
        cfg = Config.fromfile(str(CONFIGS[name]))
        init_default_scope(library)
        weights = importlib.import_module(f'{library}.registry').MODELS.build(cfg.model).state_dict()
        metainfo = dict(classes=('thing',) * 150, palette=[(1, 2, 3)] * 150)
        torch.save(dict(state_dict=weights, meta=dict(dataset_meta=metainfo)), tmp_path / 'weights.pth')
        build = getattr(importlib.import_module(f'{library}.apis'), inferencer)
        infer = build(name, weights=str(tmp_path / 'weights.pth'), device='cpu')
        assert all(torch.equal(value, infer.model.state_dict()[key]) for key, value in weights.items())
        if library == 'mmdet':
            infer.model.rpn_head.test_cfg.max_per_img = 20
        image = np.random.default_rng(0).integers(0, 256, (4, 256, 3), dtype=np.uint8)
        predictions = infer(image)['predictions']
        if library == 'mmseg':
            assert predictions.shape == (4, 256) and 0 <= predictions.min() <= predictions.max() < 150
        else:
            (found,) = predictions
            assert len(found['scores']) == len(found['bboxes']) == len(found['masks'])
            assert all(0 <= score <= 1 for score in found['scores'])


@pytest.mark.slow
def test_an_installed_package_is_known_to_the_libraries_from_any_folder(tmp_path):
    """A copy with ``.mim`` inside, as a wheel has it; and the libraries keep their own models."""
    site = tmp_path / 'site'
    shutil.copytree(
        ROOT / 'mmspatialmamba', site / 'mmspatialmamba', ignore=shutil.ignore_patterns('.mim', '__pycache__')
    )
    mim = site / 'mmspatialmamba' / '.mim'
    shutil.copytree(ROOT / 'configs', mim / 'configs')
    shutil.copy(ROOT / 'model-index.yml', mim)
    code = (
        'import mmspatialmamba.apis, mmdet, mmpretrain, mmseg\n'
        'from mmengine.infer import BaseInferencer\n'
        'from mmpretrain.apis.model import ModelHub\n'
        f'print(ModelHub._models_dict[{CLASSIFIER!r}].config)\n'
        "names = {library: BaseInferencer.list_models(library) for library in ('mmdet', 'mmseg', 'mmspatialmamba')}\n"
        f"assert {DETECTOR!r} in names['mmdet'] and 'retinanet_r50_fpn_1x_coco' in names['mmdet']\n"
        f"assert {SEGMENTOR!r} in names['mmseg'] and 'fcn_r50-d8_4xb2-40k_cityscapes-512x1024' in names['mmseg']\n"
        f"assert {DETECTOR!r} not in names['mmseg'] and {SEGMENTOR!r} not in names['mmdet']\n"
        "print(sorted(names['mmspatialmamba']))\n"
    )
    environment = {**os.environ, 'PYTHONPATH': str(site)}
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert str(mim / 'configs' / 'classification' / f'{CLASSIFIER}.py') in lines
    assert lines[-1] == str(sorted(CONFIGS))
