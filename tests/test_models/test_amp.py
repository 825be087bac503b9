"""Training under autocast: nothing overflows, and it learns as in float32."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.datasets.photo_digits import compose_crop, load_source
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.ops.dispatch import why_unusable

CPU_BACKENDS = [name for name in ops.available_backends() if why_unusable(name, 'cpu') is None]
STEPS, BATCH, SIZE, IMAGES = 200, 16, 32, 320


@pytest.fixture(scope='module')
def digits():
    """Normalised PhotoDigits crops, and their labels."""
    source = load_source('train')
    labels = torch.arange(IMAGES) % 10
    crops = [compose_crop(np.random.default_rng(i), source, SIZE, label) for i, label in enumerate(labels.tolist())]
    images = torch.from_numpy(np.stack([crop.image for crop in crops])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, labels


def train(digits, dtype):
    """Losses of 200 steps, each checked to be finite with all its gradients, and the steps that the scaler skipped."""
    images, labels = digits
    torch.manual_seed(0)
    backbone = SpatialMamba(arch=dict(embed_dims=8, depths=(1, 1)), out_indices=1, drop_path_rate=0.0)
    head = nn.Linear(16, 10)
    parameters = [*backbone.parameters(), *head.parameters()]
    # At 4e-3 rounding alone decides where a run lands: over four seeds the dtypes then differ by up to 8 % either way.
    optimizer = torch.optim.AdamW(parameters, lr=2.2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**12, enabled=dtype == torch.float16)
    order = torch.Generator().manual_seed(0)
    losses, skipped = [], []
    for step in range(STEPS):
        batch = torch.randint(IMAGES, (BATCH,), generator=order)
        with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
            scores = head(backbone(images[batch])[0].mean((2, 3)))
        loss = nn.functional.cross_entropy(scores.float(), labels[batch])
        assert math.isfinite(loss.item()), step
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if all(parameter.grad.isfinite().all() for parameter in parameters):
            losses.append(loss.item())
        else:
            skipped.append(step)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return losses, skipped


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 3), reason='PyTorch has float16 autocast on a CPU since 2.3')
@pytest.mark.parametrize('backend', CPU_BACKENDS[:1])
def test_autocast_trains_as_float32_does(digits, backend):
    with ops.use_backend(backend):
        losses, skipped = train(digits, torch.float32)
        assert skipped == []
        expected = np.mean(losses[-20:])
        # It has learned, and has not finished: there is something to compare.
        assert 0.05 < expected < 0.8 * losses[0]
        for dtype in (torch.bfloat16, torch.float16):
            losses, skipped = train(digits, dtype)
            # The scaler's first guess of a scale may be too large.
            assert skipped == ([] if dtype == torch.bfloat16 else list(range(len(skipped))))
            assert len(skipped) < 5
            assert np.mean(losses[-20:]) == pytest.approx(expected, rel=0.05), dtype
