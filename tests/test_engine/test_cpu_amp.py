import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmspatialmamba.engine import CPUAmpOptimWrapper


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)

    def extract_feat(self, x):
        self.inner_dtype = (self.backbone(x)).dtype
        return (self.backbone(x),)


def build(model, **kwargs):
    return build_optim_wrapper(model, dict(type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1), **kwargs))


def test_features_are_computed_in_bfloat16_and_the_rest_in_float32():
    model = Model()
    wrapper = build(model, loss_scale='dynamic')
    assert isinstance(wrapper, CPUAmpOptimWrapper)
    before = model.backbone.weight.detach().clone()
    with wrapper.optim_context(model):
        (feature,) = model.extract_feat(torch.ones(1, 3))
        loss = model.head(feature)
    assert model.inner_dtype == torch.bfloat16
    assert feature.dtype == loss.dtype == torch.float32
    wrapper.update_params(loss.sum())
    assert not torch.equal(model.backbone.weight.detach(), before)


def test_leaves_the_model_as_it_was():
    model = Model()
    with pytest.raises(ZeroDivisionError), build(model).optim_context(model):
        raise ZeroDivisionError
    model.extract_feat(torch.ones(1, 3))
    assert model.inner_dtype == torch.float32


def test_other_dtypes_are_errors():
    with pytest.raises(ValueError, match="dtype must be 'bfloat16', but is 'float16'"):
        build(Model(), dtype='float16')
