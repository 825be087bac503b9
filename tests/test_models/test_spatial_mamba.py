import copy
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import weights
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from torch import nn

from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.utils import from_upstream

SMALL = dict(embed_dims=8, depths=(1, 2, 1, 1))


def small(**kwargs):
    torch.manual_seed(0)
    return SpatialMamba(arch=SMALL, drop_path_rate=0.0, **kwargs)


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


def reference_state(backbone, keys, last_stage=None):
    """The reference weights of a backbone that is no deeper than tiny, in our names."""
    upstream = {
        from_upstream(name, last_stage): name
        for name, _ in keys['tiny_backbone' if last_stage is None else 'tiny_classifier']
    }
    return {name: weights.make(upstream[name], tuple(v.shape)) for name, v in backbone.state_dict().items()}


def train_loss(backbone, image):
    outputs = backbone(image)
    return sum((out * weights.image(tuple(out.shape), 44 + i)).mean() for i, out in enumerate(outputs))


@pytest.mark.parametrize('arch', ['tiny', 'small', pytest.param('base', marks=pytest.mark.slow)])
def test_outputs_equal_reference(keys, goldens, arch):
    backbone = SpatialMamba(arch).eval()
    backbone.load_state_dict(weights.state_dict(keys[f'{arch}_backbone']), strict=True)
    with torch.no_grad():
        outputs = backbone(weights.image((1, 3, 150, 203), 42))
    assert len(outputs) == 4
    for i, out in enumerate(outputs):
        assert list(out.shape) == goldens[f'model/{arch}/feat{i}/shape'].tolist()
        assert relative_error(out.flatten()[::7], goldens[f'model/{arch}/feat{i}/every7']) < 1e-4


def test_gradients_equal_reference(keys, goldens):
    backbone = SpatialMamba('tiny', drop_path_rate=0.0).train()
    backbone.load_state_dict(weights.state_dict(keys['tiny_backbone']), strict=True)
    image = weights.image((2, 3, 96, 128), 43).requires_grad_()
    loss = train_loss(backbone, image)
    loss.backward()
    torch.testing.assert_close(loss, goldens['model/tiny/train_loss'], rtol=1e-4, atol=0)
    assert relative_error(image.grad, goldens['model/tiny/train_grad_image']) < 1e-4
    running_mean = backbone.stem.conv1.norm.running_mean
    assert relative_error(running_mean, goldens['model/tiny/running_mean']) < 1e-4
    parameters = dict(backbone.named_parameters())
    norms = [parameters[from_upstream(name)].grad.norm() for name in keys['tiny_backbone_parameters']]
    # A bias before a normalisation has no gradient but rounding errors.
    truth = goldens['model/tiny/train_grad_norm']
    torch.testing.assert_close(torch.stack(norms), truth, rtol=1e-4, atol=1e-5 * truth.max().item())


# In float32, rounding as another thread count or backend does flips a ReLU next to 0 and moves a loss by 5e-4.
@pytest.mark.parametrize(
    'dtype, steps, bound',
    [pytest.param(torch.float64, 4, 1e-5, marks=pytest.mark.slow), (torch.float32, 20, 1e-3)],
    ids=['float64', 'float32'],
)
def test_trajectory_equals_reference(keys, goldens, dtype, steps, bound):
    arch = dict(embed_dims=16, depths=(1, 1, 2, 1))
    backbone = SpatialMamba(arch, out_indices=-1, drop_path_rate=0.0).train()
    head = nn.Linear(128, 10)
    state = reference_state(backbone, keys, last_stage=3)
    backbone.load_state_dict(state, strict=True)
    head.load_state_dict({n: weights.make(f'head.{n}', tuple(p.shape)) for n, p in head.state_dict().items()})
    backbone, head = backbone.to(dtype), head.to(dtype)
    image, labels = weights.image((8, 3, 64, 64), 51).to(dtype), torch.arange(8)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head(backbone(image)[0].mean((2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), goldens['trajectory/loss'][:steps], rtol=0, atol=bound)


@pytest.mark.parametrize('arch, parameters', [('tiny', 26748862), ('small', 43074280), ('base', 95745592)])
def test_parameter_counts_of_the_classifiers(arch, parameters):
    with torch.device('meta'):
        backbone = SpatialMamba(arch, out_indices=-1)
        head = nn.Linear(backbone.out_channels[-1], 1000)
    assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == parameters


@pytest.mark.parametrize('height, width', [(1, 1), (1, 50), (3, 5), (31, 33), (64, 64), (65, 17)])
def test_any_image_size(height, width):
    backbone = small().eval()
    outputs = backbone(torch.randn(2, 3, height, width))
    for i, out in enumerate(outputs):
        stride = 2 ** (i + 2)
        assert out.shape == (2, 8 * 2**i, -(-height // stride), -(-width // stride))
        assert out.is_contiguous()
        assert out.isfinite().all()


@pytest.fixture
def vis_cam(monkeypatch):
    """mmpretrain's script for class activation maps, which imports pytorch-grad-cam."""
    names = ('', '.activations_and_gradients', '.utils', '.utils.image')
    cam, activations, _, image = modules = [ModuleType(f'pytorch_grad_cam{name}') for name in names]
    cam.GradCAMPlusPlus = activations.ActivationsAndGradients = image.show_cam_on_image = None
    cam.base_cam = Namespace(BaseCAM=type('BaseCAM', (), {}))
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return runpy.run_path(str(Path(get_installed_path('mmpretrain'), '.mim/tools/visualization/vis_cam.py')))


def grad_cam(model, layer, transform, image, category):
    """The class activation map that pytorch-grad-cam's GradCAM computes from what hooks on a layer get."""
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    (gradient,) = torch.autograd.grad(model(image, mode='tensor')[0, category], seen)
    gradient, activation = transform(gradient), transform(seen[0])
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu().detach()


def test_class_activation_map_of_the_default_layer(vis_cam):
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SpatialMamba', arch=SMALL, out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=64),
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    image, args = torch.randn(1, 3, 128, 160), Namespace(vit_like=False, num_extra_tokens=None)
    (layer,) = vis_cam['get_default_target_layers'](model, args)
    assert layer is model.backbone.norm3
    found = grad_cam(model, layer, lambda tensor: vis_cam['reshape_transform'](tensor, model, args), image, 2)
    # The score is linear in the mean of the features: a channel's gradient is its weight, over the number of pixels.
    (features,) = model.backbone(image)
    by_hand = torch.einsum('c,nchw->nhw', model.head.fc.weight[2], features).relu() / (4 * 5)
    assert by_hand.count_nonzero() > 3
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('in_channels', [1, 4])
def test_other_channel_counts(in_channels):
    outputs = small(in_channels=in_channels).eval()(torch.randn(1, in_channels, 32, 32))
    assert outputs[0].shape == (1, 8, 8, 8)


def test_memory_format_of_the_image_does_not_matter():
    backbone, image = small().eval(), torch.randn(2, 3, 40, 24)
    for a, b in zip(backbone(image), backbone(image.contiguous(memory_format=torch.channels_last))):
        torch.testing.assert_close(a, b)


def test_checkpointing_changes_nothing_but_memory():
    image = torch.randn(2, 3, 32, 48)
    results = []
    for with_cp in (False, True):
        backbone = small(with_cp=with_cp).train()
        train_loss(backbone, image).backward()
        results.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_checkpointing_repeats_drop_path():
    torch.manual_seed(0)
    backbone = SpatialMamba(arch=SMALL, drop_path_rate=0.5, with_cp=True).train()
    plain = copy.deepcopy(backbone)
    for module in plain.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = False
    gradients = []
    for model in (backbone, plain):
        torch.manual_seed(1)
        train_loss(model, torch.ones(2, 3, 32, 32)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_drop_path_rate_grows_linearly():
    backbone = SpatialMamba(arch=SMALL, drop_path_rate=0.4)
    for name in ('drop_path1', 'drop_path2'):
        rates = [getattr(block, name).drop_prob for stage in backbone.stages for block in stage]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen_stages):
    backbone = small(frozen_stages=frozen_stages).train()
    before = copy.deepcopy(backbone.state_dict())
    loss = train_loss(backbone, torch.randn(2, 3, 32, 32))
    if frozen_stages < 4:
        loss.backward()
    for name, parameter in backbone.named_parameters():
        root, _, rest = name.partition('.')
        stage = int(root[4:]) if root.startswith('norm') else int(rest.split('.')[0]) if root != 'stem' else -1
        frozen = stage < frozen_stages
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
    if frozen_stages >= 0:
        for name, value in backbone.stem.state_dict().items():
            torch.testing.assert_close(value, before[f'stem.{name}'], rtol=0, atol=0)


def test_norm_eval_keeps_running_statistics():
    backbone = small(norm_eval=True).train()
    before = backbone.stem.conv1.norm.running_mean.clone()
    backbone(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(backbone.stem.conv1.norm.running_mean, before, rtol=0, atol=0)
    assert backbone.training and backbone.stages[0][0].training


@pytest.mark.parametrize(
    'size, options',
    [((32, 33), {}), ((32, 32), dict(norm_eval=True)), ((32, 32), dict(norm_cfg=dict(type='GN', num_groups=2)))],
    ids=['2 pixels', 'norm_eval', 'GN'],
)
def test_one_image_trains(size, options):
    backbone = small(**options).train()
    sum(out.square().sum() for out in backbone(torch.randn(1, 3, *size))).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())
    assert all(buffer.isfinite().all() for buffer in backbone.buffers())


def test_batch_norm_of_a_single_value_is_an_error():
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        small().train()(torch.randn(1, 3, 32, 32))


def test_norm_cfg_chooses_the_normalisation():
    backbone = small(norm_cfg=dict(type='SyncBN', requires_grad=False))
    norms = [m for m in backbone.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 5 + 3
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


@pytest.mark.parametrize('out_indices', [(0,), (1, 2), -1, (3, 0)], ids=str)
def test_out_indices_train_all_that_is_used(out_indices):
    backbone = small(out_indices=out_indices).train()
    outputs = backbone(torch.randn(2, 3, 32, 32))
    indices = sorted(i % 4 for i in ([out_indices] if isinstance(out_indices, int) else out_indices))
    assert [out.shape[1] for out in outputs] == [8 * 2**i for i in indices]
    sum(out.square().sum() for out in outputs).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


def test_initial_weights():
    torch.manual_seed(0)
    backbone = SpatialMamba('tiny')
    mixer = backbone.stages[2][0].mixer
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert backbone.stages[2][0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not backbone.stages[2][0].mlp.fc1.bias.any()
    assert mixer.dt_proj.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.01)
    dt = nn.functional.softplus(mixer.dt_bias)
    assert dt.min().item() >= 1e-3 * 0.999 and dt.max().item() <= 1e-1 * 1.001
    assert dt.log().mean().item() == pytest.approx(-4.6, abs=0.2)
    assert not mixer.A_log.any() and (mixer.D == 1).all() and (mixer.fusion_alpha == 1).all()
    assert all((kernel == 1).all() for kernel in mixer.fusion_kernels)


def test_bfloat16_autocast_trains():
    backbone = small().train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = train_loss(backbone, torch.randn(2, 3, 32, 48))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_pretrained_none_starts_from_scratch_and_says_so(capfd):
    MMLogger.get_instance('test_pretrained_none')
    backbone = small(init_cfg=dict(type='Pretrained', checkpoint=None))
    backbone.init_weights()
    assert 'training starts from scratch' in capfd.readouterr().out


@pytest.mark.parametrize('prefix', ['', 'backbone.'], ids=['bare', 'prefixed'])
@pytest.mark.parametrize('names', ['ours', 'upstream'])
def test_pretrained_file_loads(tmp_path, keys, prefix, names):
    state = reference_state(small(), keys)
    if names == 'upstream':
        upstream = {from_upstream(name): name for name, _ in keys['tiny_backbone']}
        saved = {upstream[name]: value for name, value in state.items()}
    else:
        saved = state
    torch.save({'state_dict': {prefix + key: value for key, value in saved.items()}}, tmp_path / 'x.pth')
    backbone = small(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_upstream_names_load_strictly_inside_a_model(keys):
    model = nn.ModuleDict({'backbone': SpatialMamba('tiny'), 'neck': nn.Linear(2, 2)})
    state = {f'backbone.{name}': value for name, value in weights.state_dict(keys['tiny_backbone']).items()}
    model.load_state_dict({**state, 'neck.weight': torch.ones(2, 2), 'neck.bias': torch.ones(2)}, strict=True)
    expected = state['backbone.layers.3.blocks.3.self_attention.Ds']
    torch.testing.assert_close(model['backbone'].stages[3][3].mixer.D.data, expected, rtol=0, atol=0)


def test_loading_leaves_the_state_dict_alone(keys):
    state = weights.state_dict(keys['tiny_backbone'])
    names = list(state)
    SpatialMamba('tiny').load_state_dict(state)
    assert list(state) == names


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'arch': 'huge'}, "arch must be one of 'tiny', 'small', 'base' or a dict, but is 'huge'"),
        ({'arch': {'depths': (1,)}}, "an arch dict has the keys 'embed_dims' and 'depths'"),
        ({'arch': {'embed_dims': 7, 'depths': (1,)}}, 'embed_dims must be positive and even'),
        ({'out_indices': (4,)}, r'out_indices must name stages from 0 to 3, but is \(4,\)'),
        ({'out_indices': ()}, r'out_indices must name stages'),
        ({'frozen_stages': 5}, 'frozen_stages must be -1 to 4, but is 5'),
    ],
    ids=['arch', 'arch-keys', 'embed_dims', 'out_indices', 'no-output', 'frozen_stages'],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'SpatialMamba: {message}'):
        SpatialMamba(**kwargs)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match='window_size'):
        SpatialMamba(window_size=7)
