"""Peak memory of one call, in bytes beyond what was there before it; what the call returns counts."""

from __future__ import annotations

import os
from typing import Callable

import torch
from torch.autograd.profiler import profile

_MEMORY_EVENT = "[memory]"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The largest sum of what ``call`` held at a time, of memory on ``device``.

    On a CPU it is what torch's allocator gave and took back, compiled graphs included, to the byte; not what a library
    takes from the system by itself, as the native kernels do for scratch of about a slice per thread.
    """
    return _on_gpu(call) if device.type == "cuda" else _on_cpu(call)


def _on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of the profiler announce every start and stop
    with profile(profile_memory=True) as profiler:
        result = call()
    del result  # not before the profiler has stopped
    events = [event for event in profiler.kineto_results.events() if event.name() == _MEMORY_EVENT]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak
