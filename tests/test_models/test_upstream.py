import pytest
import torch

from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.utils import from_upstream, is_upstream


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@pytest.mark.parametrize('part', ['backbone', 'classifier'])
def test_every_upstream_name_has_a_parameter_of_its_shape(keys, arch, part):
    with torch.device('meta'):
        backbone = SpatialMamba(arch, out_indices=(3,) if part == 'classifier' else (0, 1, 2, 3))
    last_stage = 3 if part == 'classifier' else None
    upstream = {
        from_upstream(name, last_stage): shape for name, shape in keys[f'{arch}_{part}'] if not name.startswith('head.')
    }
    assert upstream == {name: list(value.shape) for name, value in backbone.state_dict().items()}


def test_our_own_names_stay():
    names = list(SpatialMamba(dict(embed_dims=8, depths=(1, 1)), out_indices=(0, 1)).state_dict())
    assert [from_upstream(name) for name in names] == names
    assert not is_upstream(names)
