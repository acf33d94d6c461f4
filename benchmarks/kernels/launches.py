"""How much one call puts on a GPU."""

from __future__ import annotations

import os
from typing import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fillings of one call, as the profiler saw them on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of the profiler announce every start and stop
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return count_on_gpu(profiler.profiler.kineto_results.events())


def count_on_gpu(events) -> int:
    """Those of the profiler's events that ran on the GPU, without what only marks a span of time there."""
    return sum(event.device_type() == DeviceType.CUDA and not event.is_user_annotation() for event in events)
