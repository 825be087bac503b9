"""torch.compile and torch.export of the backbone."""

import copy

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from mmspatialmamba import ops
from mmspatialmamba.compat import TORCH
from mmspatialmamba.models import SpatialMamba
from mmspatialmamba.models.layers import SpatialMambaBlock
from mmspatialmamba.ops.dispatch import why_unusable

pytestmark = pytest.mark.skipif(TORCH < (2, 9), reason='one graph needs PyTorch 2.9')
CPU_BACKENDS = [name for name in ops.available_backends() if why_unusable(name, 'cpu') is None]
SIZES = [(2, 3, 64, 48), (2, 3, 40, 75)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_backbone(stages=2):
    torch.manual_seed(0)
    arch = dict(embed_dims=8, depths=(1,) * stages)
    return SpatialMamba(arch=arch, out_indices=range(stages), drop_path_rate=0.0)


def results(model, image):
    """Outputs, and gradients of the parameters and of the image."""
    model.zero_grad()
    image = image.clone().requires_grad_()
    outputs = model(image)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().mean() for output in outputs).backward()
    return [*outputs, image.grad, *(p.grad for p in model.parameters())]


def check_compiled(model, sizes, compiler, rtol):
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for size in sizes:
        image = torch.randn(size, generator=torch.Generator().manual_seed(size[-1]))
        for value, expected in zip(results(compiled, image), results(eager, image)):
            # A bias before a normalisation has no gradient but rounding errors.
            torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-6 + rtol * expected.abs().max().item())
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', CPU_BACKENDS)
def test_compiled_block_equals_eager(name):
    torch.manual_seed(0)
    with ops.use_backend(name):
        check_compiled(SpatialMambaBlock(8), [(2, 8, 6, 5), (3, 8, 4, 9)], 'aot_eager', rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, compiler, stages, rtol',
    [*((name, 'aot_eager', 2, 1e-6) for name in CPU_BACKENDS), (CPU_BACKENDS[0], 'inductor', 1, 1e-3)],
)
def test_compiled_backbone_equals_eager(compiler, stages, rtol, name):
    # Without this setting inductor 2.14 cannot order the symbolic strides of a permuted map kept for the backward pass.
    settings = {'strict_output_strides': True} if hasattr(torch._inductor.config, 'strict_output_strides') else {}
    with ops.use_backend(name), torch._inductor.config.patch(settings):
        # Inductor 2.14 fixes the image size itself, where it lowers the backward pass of PyTorch's convolutions, so a
        # second size would only take the same time again.
        check_compiled(small_backbone(stages), SIZES[:1] if compiler == 'inductor' else SIZES, compiler, rtol)


@pytest.mark.slow
@pytest.mark.parametrize('name', CPU_BACKENDS[:1])
@pytest.mark.parametrize('strict', [False, True], ids=['non-strict', 'strict'])
def test_exported_backbone_equals_eager(strict, name):
    backbone = small_backbone().eval()
    shape = {0: torch.export.Dim('batch', min=2), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with ops.use_backend(name), torch.no_grad():
        exported = torch.export.export(backbone, (torch.randn(SIZES[0]),), dynamic_shapes=(shape,), strict=strict)
        for size in SIZES:
            image = torch.randn(size)
            torch.testing.assert_close(exported.module()(image), backbone(image))
