"""What test_distributed.py runs in two processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMFullyShardedDataParallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mmspatialmamba.models import SpatialMamba

ARCH = dict(embed_dims=8, depths=[1, 1, 1, 1])
SUBSETS = [indices for n in range(1, 5) for indices in itertools.combinations(range(4), n)]
OPTIONS = {
    'plain': {},
    'norm_eval': dict(norm_eval=True),
    'with_cp': dict(with_cp=True),
    'frozen stem': dict(frozen_stages=0),
    'frozen stages': dict(frozen_stages=2),
    'frozen stages, with_cp': dict(frozen_stages=2, with_cp=True),
}


class Detector(nn.Module):
    """A backbone with a head that uses all of its outputs."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.backbone = SpatialMamba(ARCH, drop_path_rate=0.0, **options)
        channels = [self.backbone.out_channels[i] for i in self.backbone.out_indices]
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return sum(head(out).square().mean() for head, out in zip(self.heads, self.backbone(image)))


def train_under_ddp(rank: int, folder: str) -> None:
    """Train backbones of several ``out_indices`` under DistributedDataParallel, as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for out_indices, options in itertools.product([(0,), (1,), (0, 2), (0, 1, 2, 3)], OPTIONS.values()):
        torch.manual_seed(rank)
        model = DistributedDataParallel(Detector(out_indices=out_indices, **options).train())
        train(model)
        weights = nn.utils.parameters_to_vector(model.parameters())
        others = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(others, weights.detach())
        torch.testing.assert_close(others[0], others[1], rtol=0, atol=0)
    model = Detector(out_indices=(0,)).train()
    model.backbone.stages[3].requires_grad_(True)
    with pytest.raises(RuntimeError, match='Expected to have finished reduction'):
        train(DistributedDataParallel(model))
    dist.destroy_process_group()


def train(model: nn.Module) -> None:
    """Train for three steps, the last two of which fail if DistributedDataParallel waits for a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).backward()
        optimizer.step()


def share_parameters(rank: int, folder: str, wrapper: dict) -> None:
    """Wrap a backbone by FullyShardedDataParallel, as one of two processes."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    backbone = SpatialMamba(ARCH)
    blocks = sum(backbone.depths)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    wrapped = MMFullyShardedDataParallel(backbone, device_id='cpu', **wrapper)
    assert len(FullyShardedDataParallel.fsdp_modules(wrapped)) == 1 + blocks
    assert sum(parameter.numel() for parameter in wrapped.parameters()) == pytest.approx(total / 2, rel=0.01)
    dist.destroy_process_group()
