import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.ops.flops import JIT_HANDLES, multiply_adds, register_with_mmengine

analysis = pytest.importorskip('mmengine.analysis')
ROOT = Path(__file__).parents[2]
GET_FLOPS = 'tools/analysis_tools/get_flops.py'
REGISTERED = [
    name
    for name in ('torch', 'triton', 'native')
    if hasattr(getattr(torch.ops, f'mmspatialmamba_{name}'), 'state_fusion')
]
# A model on Triton's interpreter would take hours.
ON_CPU = [name for name in ops.available_backends() if name != 'triton']
needs_formulas = pytest.mark.skipif(TORCH < (2, 2), reason='FlopCounterMode takes formulas since PyTorch 2.2')
SMALL_ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1))


def run_python(*arguments, **options):
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def analyzer(model, inputs):
    return analysis.FlopAnalyzer(model, inputs).set_op_handle(**JIT_HANDLES)


def counted(function, *tensors):
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def leaves(*shapes):
    return [torch.rand(shape, requires_grad=True) for shape in shapes]


@needs_formulas
@pytest.mark.parametrize('backend', REGISTERED)
class TestTorchCounter:
    """Two operations a multiply-add, on tensors without data, so that nothing is run."""

    @pytest.fixture(autouse=True)
    def without_data(self):
        with FakeTensorMode():
            yield

    def test_selective_scan(self, backend):
        scan = getattr(torch.ops, f'mmspatialmamba_{backend}').selective_scan
        tensors = leaves((2, 3, 11), (2, 3, 11), (3, 4), (2, 4, 11))
        elements = 2 * 3 * 4 * 11
        assert counted(lambda *t: scan(*t, None, True), *tensors) == (2 * 7 * elements, 2 * 14 * elements)

    def test_state_fusion(self, backend):
        fusion = getattr(torch.ops, f'mmspatialmamba_{backend}').state_fusion
        tensors = leaves((2, 3, 5, 7), (3, 1, 3, 3), (3, 1, 3, 3), (3, 1, 3, 3), (3,))
        elements = 2 * 3 * 5 * 7
        assert counted(fusion, *tensors) == (2 * 27 * elements, 2 * 54 * elements)

    def test_structure_aware_scan(self, backend):
        scan = getattr(torch.ops, f'mmspatialmamba_{backend}').structure_aware_scan
        image, kernel = (2, 3, 5, 7), (3, 1, 3, 3)
        tensors = leaves(image, image, (3, 1), (2, 1, 5, 7), (2, 1, 5, 7), (3,), kernel, kernel, kernel, (3,), (3,))
        elements = 2 * 3 * 5 * 7
        assert counted(lambda *t: scan(*t, True), *tensors) == (2 * 36 * elements, 2 * (34 + 72) * elements)


@needs_formulas
@pytest.mark.parametrize('backend', ON_CPU)
def test_torch_and_mmengine_count_a_backbone_alike(backend):
    from mmspatialmamba.models import SpatialMamba

    model = SpatialMamba(arch=SMALL_ARCH).eval()
    image = torch.rand(1, 3, 64, 64)
    with ops.use_backend(backend):
        by_operator = analyzer(model, image).by_operator()
        with FlopCounterMode(display=False) as counter:
            model(image)
    inner, pixels = [32, 64, 128, 256], [16**2, 8**2, 4**2, 2**2]
    assert by_operator['structure_aware_scan'] == 36 * sum(c * p for c, p in zip(inner, pixels))
    products = sum(by_operator[name] for name in ('conv', 'linear', 'structure_aware_scan'))
    assert counter.get_total_flops() == 2 * products
    with ops.use_backend('torch'):
        assert by_operator == analyzer(model, image).by_operator()


def profile(model, image, rules):
    """Count multiply-adds and parameters as thop.profile does: by hooks on the classes in ``rules``."""

    def count_below(module):
        counts = [module.total_ops.item(), 0]
        for child in module.children():
            found = (child.total_ops.item(), sum(p.numel() for p in child.parameters()))
            for i, count in enumerate(found if type(child) in rules else count_below(child)):
                counts[i] += count
        return counts

    for module in model.modules():
        module.register_buffer('total_ops', torch.zeros(1, dtype=torch.float64))
        if type(module) in rules:
            module.register_forward_hook(rules[type(module)])
    with torch.no_grad():
        model(image)
    return tuple(count_below(model))


@needs_formulas
def test_tools_that_hook_modules_count_all():
    from mmspatialmamba.models import SpatialMamba
    from mmspatialmamba.models.layers import THOP_OPS, LayerNorm2d

    def count_linear(linear, inputs, output):
        linear.total_ops += linear.in_features * output.numel()

    def count_conv(conv, inputs, output):
        conv.total_ops += conv.weight[0].numel() * output.numel()

    model, image = SpatialMamba(arch=SMALL_ARCH).eval(), torch.rand(1, 3, 64, 64)
    parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(image)
    norms = dict.fromkeys((LayerNorm2d, torch.nn.LayerNorm, torch.nn.BatchNorm2d), lambda *args: None)
    rules = {torch.nn.Linear: count_linear, torch.nn.Conv2d: count_conv, **THOP_OPS, **norms}
    twice = torch.nn.Sequential(model)
    twice.forward = lambda image: (model(image), model(image))
    assert profile(twice, image, rules) == (counter.get_total_flops(), parameters)


@pytest.mark.parametrize('backend', ON_CPU)
def test_unfused_ops_are_counted_in_a_trace(backend):
    class Unfused(torch.nn.Module):
        def forward(self, u, A, B, kernel, alpha):
            h = ops.selective_scan(u, u, A, B)
            return ops.state_fusion(h[:, :, 0].view(2, 3, 5, 7), (kernel, kernel, kernel), alpha)

    tensors = torch.rand(2, 3, 35), -torch.rand(3, 1), torch.rand(2, 1, 35), torch.rand(3, 1, 3, 3), torch.rand(3)
    with ops.use_backend(backend):
        by_operator = analyzer(Unfused(), tensors).by_operator()
    assert by_operator == {'selective_scan': 7 * 210, 'state_fusion': 27 * 210}


def test_formula_of_an_unknown_op():
    with pytest.raises(KeyError, match='softmax'):
        multiply_adds('softmax', 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    'backend, arch, giga, parameters',
    [
        *((backend, 'tiny', '4.47', 26_748_862) for backend in ON_CPU),
        (ON_CPU[0], 'small', '7.12', 43_074_280),
        (ON_CPU[0], 'base', '15.80', 95_745_592),
    ],
)
def test_classifiers_have_the_published_figures(backend, arch, giga, parameters):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(ROOT / f'configs/classification/spatialmamba-{arch}_8xb128_in1k.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with ops.use_backend(backend):
        total = analyzer(model, torch.rand(1, 3, 224, 224)).total()
    assert f'{total / 1e9:.2f}' == giga


@needs_formulas
@pytest.mark.parametrize('backend', ON_CPU)
def test_torch_counts_the_public_ops_in_either_order_of_imports(backend):
    code = (
        'import sys, torch; finders = list(sys.meta_path)\n'
        'from mmspatialmamba import ops\n'
        'from torch.utils.flop_counter import FlopCounterMode\n'
        'x, weight, bias = torch.rand(2, 3, 5, 7), torch.rand(3, 1, 3, 3), torch.rand(3)\n'
        f'with ops.use_backend({backend!r}), FlopCounterMode(display=False) as counter:\n'
        '    ops.depthwise_conv(x, weight, bias)\n'
        '    ops.state_fusion(x, [weight] * 3, bias)\n'
        'print(counter.get_total_flops(), sys.meta_path == finders)\n'
    )
    assert run_python('-c', code, cwd=ROOT).split() == [str(2 * (9 + 27) * 210), 'True']


def test_mmengine_counts_a_model_once_told(monkeypatch):
    class Fusion(torch.nn.Module):
        def forward(self, h, kernel, alpha):
            return ops.state_fusion(h, (kernel, kernel, kernel), alpha)

    handles = analysis.complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    monkeypatch.setattr(analysis.complexity_analysis, '_DEFAULT_SUPPORTED_FLOP_OPS', dict(handles))
    inputs = torch.rand(2, 3, 5, 7), torch.rand(3, 1, 3, 3), torch.rand(3)
    totals = []
    for _ in range(2):
        totals.append(analysis.get_model_complexity_info(Fusion(), inputs=inputs)['flops'])
        register_with_mmengine()
    assert totals == [0, 27 * 210]


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, shape, giga',
    [
        ('classification/spatialmamba-tiny_8xb128_in1k.py', (224, 224), 4.465),
        ('detection/mask-rcnn_spatialmamba-tiny_fpn_1x_coco.py', (800, 1280), 261),
        # Published for 512 x 2048, four times the pixels.
        ('segmentation/spatialmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py', (512, 512), 936 / 4),
    ],
    ids=['classifier', 'detector', 'segmentor'],
)
def test_get_flops_of_the_libraries(config, shape, giga):
    out = run_python(GET_FLOPS, f'configs/{config}', '--shape', *shape, cwd=ROOT)
    assert f'Input shape: {shape}' in out.replace('(3, ', '(')
    number, unit = re.search(r'Flops: ([\d.]+)([GT])', out).groups()
    assert float(number) * {'G': 1, 'T': 1000}[unit] == pytest.approx(giga, rel=0.02)


def test_get_flops_names_the_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['get_flops.py', 'nowhere.py', '--shape', '64', '64'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / GET_FLOPS), run_name='__main__')
    assert stop.value.code == 2
    assert 'get_flops.py: there is no config file nowhere.py' in capsys.readouterr().err
