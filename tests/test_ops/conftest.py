import pytest

from mmspatialmamba import ops
from mmspatialmamba.ops.dispatch import why_unusable

CPU_BACKENDS = [name for name in ops.available_backends() if why_unusable(name, 'cpu') is None]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Name of a backend that runs CPU tensors; the test runs on it, once for each."""
    with ops.use_backend(request.param):
        yield request.param
