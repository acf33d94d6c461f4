"""Launches are counted from the profiler's events: what ran on the GPU, and no marks of time."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.kernels.launches import count_launches, count_on_gpu


def event(device, annotation=False):
    return SimpleNamespace(device_type=lambda: device, is_user_annotation=lambda: annotation)


def test_only_what_ran_on_the_gpu_counts():
    events = [event(DeviceType.CUDA), event(DeviceType.CPU), event(DeviceType.CUDA, True), event(DeviceType.CUDA)]
    assert count_on_gpu(events) == 2
    assert count_launches(lambda: torch.ones(2) + 1, torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_launches_on_a_gpu():
    x = torch.ones(1 << 20, device="cuda")
    assert count_launches(lambda: (x + 1) * 2, x.device) == 2
