"""What the tests on a GPU share."""

import pytest


@pytest.fixture
def launched_by_one(monkeypatch):
    """The kernels launched, on a GPU said to have one processor: few programs are enough to go over slices by tiles."""
    pytest.importorskip("triton")
    from daam_kernels.kernels import density_backward, density_forward, host, mixture_backward
    from daam_kernels.kernels.remembered import forget_launches

    launched = []
    for module in (density_forward, density_backward, mixture_backward):

        def run(kernel, *args, original=module.run, **kwargs):
            launched.append(kernel.fn.__name__)
            original(kernel, *args, **kwargs)

        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(host, "processors", lambda device: 1)
    forget_launches()
    yield launched
    forget_launches()
