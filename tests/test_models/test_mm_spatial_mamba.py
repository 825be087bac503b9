import pytest
import torch
import weights
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmspatialmamba.models import MM_SpatialMamba, SpatialMamba


def test_drops_swin_arguments_with_one_warning(capfd):
    MMLogger.get_instance('test_drops_swin_arguments')
    backbone = MM_SpatialMamba(
        dims=8, depths=(1, 1, 1, 1), embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.1
    )
    warnings = [line for line in capfd.readouterr().out.splitlines() if 'dropped' in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(': embed_dims, num_heads, window_size')
    assert backbone.out_channels == (8, 16, 32, 64)


def test_takes_the_arguments_of_an_inherited_swin_config():
    cfg = Config.fromfile(Config._get_cfg_path('mmseg::_base_/models/upernet_swin.py', '')[0])
    arguments = {**cfg.model.backbone, 'depths': (1, 1, 1, 1), 'dims': 8, 'd_state': 1}
    assert arguments.pop('type') == 'SwinTransformer'
    assert MM_SpatialMamba(**arguments).depths == (1, 1, 1, 1)


def test_equals_spatial_mamba(keys):
    state = weights.state_dict(keys['tiny_backbone'])
    ours, theirs = SpatialMamba('tiny').eval(), MM_SpatialMamba(dims=64, depths=(2, 4, 8, 4)).eval()
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    image = torch.randn(1, 3, 32, 32)
    for a, b in zip(ours(image), theirs(image)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_loads_pretrained(tmp_path, keys):
    state = weights.state_dict(keys['tiny_backbone'])
    torch.save(state, tmp_path / 'x.pth')
    backbone = MM_SpatialMamba(pretrained=str(tmp_path / 'x.pth'))
    backbone.init_weights()
    expected = state['layers.3.blocks.3.self_attention.Ds']
    torch.testing.assert_close(backbone.stages[3][3].mixer.D.data, expected, rtol=0, atol=0)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match='colour'):
        MM_SpatialMamba(colour='red')


def test_other_state_sizes_are_errors():
    with pytest.raises(ValueError, match='d_state must be 1, the only state size there is, but is 16'):
        MM_SpatialMamba(d_state=16)
