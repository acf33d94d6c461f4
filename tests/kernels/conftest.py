"""What the tests of the kernels share. Triton may be missing, so its modules are imported where they are used."""

import pytest


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short slices are split over blocks, each with several tiles."""
    yield from _small_tiles(monkeypatch, cached=1)


@pytest.fixture
def looped_tiles(monkeypatch):
    """The same, but that one program goes over the tiles of its slices."""
    yield from _small_tiles(monkeypatch, cached=1 << 30)


@pytest.fixture
def one_processor(monkeypatch):
    """A device so small that the tiles of few elements are those that a larger one has of many."""
    from daam_kernels.kernels import host
    from daam_kernels.kernels.remembered import forget_launches

    monkeypatch.setattr(host, "processors", lambda device: 1)
    forget_launches()
    yield
    forget_launches()


def _small_tiles(monkeypatch, cached):
    from daam_kernels.kernels import host, tiling
    from daam_kernels.kernels.remembered import forget_launches

    budget = tiling.Budget(64, 64, 64, 64, split=64, split_forward=64, usual=64, merged=64)
    monkeypatch.setattr(tiling, "BUDGET", budget)
    monkeypatch.setattr(tiling, "_PROGRAMS_EACH", 8)
    monkeypatch.setattr(tiling, "_CACHED", cached)
    monkeypatch.setattr(tiling, "_LOOPED_BYTES", 1 << 20)  # a warp each
    monkeypatch.setattr(tiling, "_LOOPED_EACH", 1)
    monkeypatch.setattr(tiling, "_LOOPED_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "_THREAD_ELEMENTS", 2)
    monkeypatch.setattr(host, "processors", lambda device: 1)
    forget_launches()
    yield
    forget_launches()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched so far."""
    from daam_kernels.kernels import density_backward, density_block, density_forward, mixture_backward

    names = []
    for module in (density_backward, density_block, density_forward, mixture_backward):

        def run(kernel, *args, original=module.run, **kwargs):
            names.append(kernel.fn.__name__)
            original(kernel, *args, **kwargs)

        monkeypatch.setattr(module, "run", run)
    return names
