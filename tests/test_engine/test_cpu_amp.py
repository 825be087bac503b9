import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmspatialmamba.engine import CPUAmpOptimWrapper


def build(model, **kwargs):
    return build_optim_wrapper(model, dict(type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1), **kwargs))


def test_forward_is_bfloat16_and_weights_stay_float32():
    model = nn.Linear(3, 2)
    wrapper = build(model, loss_scale='dynamic')
    assert isinstance(wrapper, CPUAmpOptimWrapper)
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
    assert not torch.is_autocast_enabled('cpu')


def test_other_dtypes_are_errors():
    with pytest.raises(ValueError, match="dtype must be 'bfloat16', but is 'float16'"):
        build(nn.Linear(3, 2), dtype='float16')
