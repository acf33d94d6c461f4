"""Peak memory of one call, in bytes beyond what was there before it; what the call returns counts."""

from __future__ import annotations

import os
from typing import Callable, Iterable, Iterator

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


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
    sizes: dict[int, int] = {}  # of what the call took, by address
    held = peak = 0
    for event in sorted(_changes(profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[address] = size
            held += size
            peak = max(peak, held)
        else:  # the profiler takes some memory from before the call for what it saw at that address in a call before
            held -= sizes.pop(address, 0)
    return peak


def _changes(events: Iterable) -> Iterator:
    """What the allocator gave and took back, on a CPU."""
    for event in events:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event
        yield from _changes(event.children)
