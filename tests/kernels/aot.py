"""Every kernel, compiled ahead of time for GPUs that are not here: ``python tests/kernels/aot.py``.

The host functions run on CPU tensors through Triton's own JIT (specialisation, options, grid, machine code); only the
launch itself is replaced by a recording. Runs in a process of its own, because Triton's interpreter cannot be on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import instructions
import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448, "gfx942": 65_536}  # that a program may have on such a processor


@dataclass(frozen=True)
class Case:
    """One call of forward and backward. ``aligned``: every access of x, y, g and dx can be 16 bytes wide.

    ``sequences``: how many, and how long at most, are packed along the axis, which is then 0.
    """

    shape: tuple[int, ...]
    axis: int
    heads: int
    gaussians: int = 4
    aligned: bool = True
    mask: bool = False
    weights: bool = False
    inference: bool = False  # forward alone, and no statistics saved
    density: str = "product"
    sequences: tuple[int, int] | None = None
    layers: int = 1
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class AdditiveCase:
    """One call of additive attention, forward and backward, with weights and their gradient where ``weights`` says so.

    ``mask``: None, or "added" with its gradient, or "boolean".
    """

    shape: tuple[int, int, int, int]  # batch, heads, queries, keys
    hidden: int = 64
    value_dim: int = 64
    mask: str | None = None
    weights: bool = False
    average: bool = False  # the weights, over the heads
    causal: bool = False
    dropout: float = 0.0
    fast: bool = False
    aligned: bool = True


@dataclass(frozen=True)
class PoolCase:
    """One call of attention pooling, forward and backward; ``options``: packed, with padding, dropout and weights."""

    shape: tuple[int, int, int]  # bags, rows, embed_dim
    hops: int = 1
    hidden: int | None = None
    gated: bool = False  # with layers of x's type, else of float32
    options: bool = False
    aligned: bool = True


# Every kernel, along rows and in columns: compiled for float32 and bfloat16 on every target, for the others on sm_90.
CORE = {
    "rows": Case((64, 2048), 1, 8),
    "columns": Case((1, 1024, 512), 1, 8, gaussians=64),
    "many rows": Case((1 << 14, 512), 1, 1, gaussians=64),
    "looped columns": Case((8, 2048, 512), 1, 8),
    "looped columns, inference": Case((8, 2048, 512), 1, 8, inference=True),
    "split rows": Case((1, 1 << 20), 1, 1, weights=True),
    "split columns": Case((2, 16384, 64), 1, 1),
    "mixture in rows": Case((64, 2048), 1, 8, density="mixture"),
    "mixture in columns": Case((4, 2048, 512), 1, 8, density="mixture", gaussians=64),
    "looped mixture in rows": Case((1 << 12, 2048), 1, 8, density="mixture"),
    "looped mixture in columns": Case((16, 2048, 512), 1, 8, density="mixture"),
    "mixture in split rows": Case((1, 1 << 20), 1, 1, density="mixture", weights=True),
    "mixture in split columns": Case((2, 16384, 64), 1, 1, density="mixture"),
    "gate in rows": Case((64, 2048), 1, 1, density="gate"),
    "gaussian in columns": Case((4, 96, 1024), 1, 8, density="gaussian"),
}
# What else changes the code: compiled for float32 and bfloat16 on sm_90.
MORE = {
    "many rows, masked": Case((1 << 14, 512), 1, 1, mask=True, options={"padding_stats": "exclude"}),
    "many long rows": Case((1 << 14, 16384), 1, 8),
    "rows of 1000": Case((64, 4000), 1, 4, gaussians=5),
    "odd rows": Case((64, 333), 1, 3, aligned=False),
    "long rows": Case((4, 16384), 1, 1),
    "looped short columns": Case((32, 40, 1024), 1, 8),
    "short columns": Case((8, 24, 1024), 1, 8, weights=True),
    "odd columns": Case((8, 41, 333), 1, 4, aligned=False),
    "looped rows": Case((256, 1 << 15), 1, 1, gaussians=64, weights=True),
    "looped columns, masked": Case((8, 2048, 512), 1, 8, mask=True, options={"padding_stats": "exclude"}),
    "odd looped columns": Case((8, 2041, 333), 1, 8, aligned=False),
    "uneven looped columns, inference": Case((8, 2040, 512), 1, 8, weights=True, inference=True),
    "thin columns": Case((4, 65536, 8), 1, 1),
    "padded": Case((16, 2048), 1, 8, options={"padding_value": 0.0}),
    "masked": Case((4, 512, 512), 1, 4, mask=True, options={"padding_stats": "exclude"}),
    "split and masked": Case((1, 1 << 18), 1, 2, mask=True, options={"padding_stats": "exclude", "padding_value": 1.0}),
    "softmax and residual": Case((16, 2048), 1, 2, options={"normalize": "softmax", "residual": True}),
    "mixture in odd rows": Case((64, 333), 1, 3, density="mixture", aligned=False),
    "mixture in short columns": Case((8, 24, 1024), 1, 8, density="mixture"),
    "looped mixture of 64 Gaussians in rows": Case((1 << 12, 4096), 1, 1, gaussians=64, density="mixture"),
    "looped mixture of 64 Gaussians in columns": Case((16, 2048, 512), 1, 8, gaussians=64, density="mixture"),
    "looped mixture in short columns": Case((32, 40, 5120), 1, 8, density="mixture"),
    "looped mixture in odd columns": Case((16, 2041, 333), 1, 8, density="mixture", aligned=False),
    "looped mixture in rows, masked": Case(
        (1 << 12, 2048), 1, 8, mask=True, density="mixture", options={"padding_stats": "exclude"}
    ),
    "looped mixture in columns, masked": Case(
        (16, 2048, 512), 1, 8, mask=True, density="mixture", options={"padding_stats": "exclude"}
    ),
    "looped mixture in ragged columns": Case((1 << 15, 512), 0, 8, density="mixture", sequences=(64, 1024)),
    "mixture, masked": Case((4, 512, 512), 1, 4, mask=True, density="mixture", options={"padding_stats": "exclude"}),
    "mixture, split and masked": Case(
        (1, 1 << 18), 1, 2, mask=True, density="mixture", options={"padding_stats": "exclude", "padding_value": 1.0}
    ),
    "ragged rows": Case((1 << 16, 1), 0, 8, aligned=False, sequences=(64, 2048)),
    "ragged columns": Case((1 << 15, 512), 0, 8, sequences=(64, 1024)),
    "ragged split columns, masked": Case(
        (1 << 17, 64), 0, 1, mask=True, sequences=(16, 1 << 14), options={"padding_stats": "exclude"}
    ),
    "mixture in ragged split columns": Case((1 << 17, 64), 0, 1, density="mixture", sequences=(16, 1 << 14)),
    "gate in columns": Case((4, 512, 512), 1, 8, density="gate"),
    "gaussian in rows": Case((64, 2048), 1, 8, density="gaussian"),
    "gate, split and masked": Case(
        (1, 1 << 18), 1, 2, mask=True, density="gate", options={"padding_stats": "exclude", "multiply": False}
    ),
    "gaussian in split columns": Case((2, 16384, 64), 1, 1, density="gaussian"),
}
# A block's layers in one sweep: compiled for float32 and bfloat16 on sm_90, and where registers are fewest on every
# target.
BLOCKS = {
    "block in rows": Case((64, 4096), 1, 1, layers=3),
    "block in columns": Case((4, 1024, 512), 1, 8, layers=3),
}
# Additive attention, where registers are fewest and where the code differs.
ADDITIVE_CORE = {
    "additive": AdditiveCase((2, 4, 512, 512)),
    "additive, decoding": AdditiveCase((4, 8, 1, 4096)),
}
ADDITIVE_MORE = {
    "additive, wide": AdditiveCase((2, 1, 10, 128), 1024, 1024),
    "additive, decoding, wide": AdditiveCase((64, 1, 1, 66), 1024, 1024),
    "additive, all options": AdditiveCase(
        (2, 4, 96, 96), mask="added", weights=True, average=True, causal=True, dropout=0.1
    ),
    "additive, fast": AdditiveCase((2, 4, 512, 512), fast=True),
    "additive, odd and masked": AdditiveCase((2, 3, 33, 65), 37, 41, mask="boolean", weights=True, aligned=False),
}
# Attention pooling: where its code differs, and where registers are fewest.
POOLS = {
    "pool": PoolCase((4, 2000, 512)),
    "pool, hops": PoolCase((4, 2000, 1024), hops=8),
    "pool, long rows": PoolCase((4, 20, 8192)),
    "pool, longer rows": PoolCase((4, 20, 20480), hops=2),
    "pool, odd rows": PoolCase((4, 200, 333), hops=3, aligned=False),
    "pool, gated": PoolCase((4, 500, 512), hidden=128, gated=True),
    "pool, additive": PoolCase((4, 500, 512), hidden=128),
    "pool, odd and gated": PoolCase((4, 200, 333), hops=3, hidden=37, gated=True, aligned=False),
    "pool, all options": PoolCase((4, 200, 512), hidden=16, options=True),
    "pool, wide": PoolCase((4, 500, 600), hops=30, hidden=352, gated=True),
    "pool, wide with all options": PoolCase((4, 200, 512), hops=40, hidden=160, options=True),
}
# A mixture in whole tiles, its Gaussians in no loop, and without a gradient, so that instructions can be counted: for
# one type each.
STRAIGHT = {
    "mixture of 4 Gaussians": Case((256, 8192), 1, 1, density="mixture"),
    "mixture of 8 Gaussians": Case((256, 8192), 1, 1, density="mixture", gaussians=8),
}
CASES = {**CORE, **MORE, **BLOCKS, **STRAIGHT, **ADDITIVE_CORE, **ADDITIVE_MORE, **POOLS}
CORE_JOBS = [(name, "bf16", target) for name in CORE for target in TARGETS]
CORE_JOBS += [(name, "fp32", target) for name in CORE for target in TARGETS]
CORE_JOBS += [(name, dtype, "sm_90") for name in CORE for dtype in ("fp64", "fp16")]
CORE_JOBS += [(name, "bf16", target) for name in ADDITIVE_CORE for target in TARGETS]
CORE_JOBS += [(name, dtype, "sm_90") for name in ADDITIVE_CORE for dtype in ("fp32", "fp64")]
CORE_JOBS += [("additive", "fp32", "gfx942")]
CORE_JOBS += [("pool", "bf16", target) for target in TARGETS]
CORE_JOBS += [("pool", "fp64", "sm_90"), ("pool", "fp32", "gfx942"), ("pool, hops", "fp32", "sm_80")]
JOBS = CORE_JOBS + [(name, dtype, "sm_90") for name in (*MORE, *BLOCKS) for dtype in ("fp32", "bf16")]
JOBS += [(name, "bf16", target) for name in ("many rows", "many long rows") for target in TARGETS if target != "sm_90"]
JOBS += [("block in columns", "bf16", target) for target in TARGETS if target != "sm_90"]
JOBS += [("mixture of 4 Gaussians", "bf16", target) for target in TARGETS]
JOBS += [("mixture of 8 Gaussians", "fp32", target) for target in ("sm_90", "sm_100")]
JOBS += [(name, "bf16", "sm_90") for name in ADDITIVE_MORE]
JOBS += [("additive, odd and masked", "fp64", "sm_90")]  # a mask's type must not decide how float64 is multiplied
JOBS += [("additive, all options", "fp32", "sm_90")]
JOBS += [(name, "bf16", "sm_90") for name in POOLS if name != "pool"]
JOBS += [
    (f"pool, {score}", "bf16", target) for score in ("gated", "additive") for target in ("sm_80", "sm_100", "gfx942")
]
JOBS += [("pool, gated", "fp32", "sm_80"), ("pool, gated", "fp32", "gfx942"), ("pool, odd and gated", "fp32", "sm_80")]
JOBS += [("pool, odd and gated", "bf16", "gfx942")]
JOBS += [("pool, all options", "fp64", "sm_80")]  # masks, beside products of float64
JOBS += [("pool, wide", "bf16", target) for target in ("sm_80", "sm_100", "gfx942")]
JOBS += [("pool, wide", "fp32", target) for target in ("sm_80", "gfx942")]
JOBS += [("pool, wide with all options", "fp64", "sm_80")]
JOBS += [("pool, longer rows", "fp64", "sm_90"), ("pool, longer rows", "bf16", "gfx942")]

# additive_gradients adds two numbers per thread at a time.
READERS = {
    "additive_gradients",
    "additive_output",
    "pool_hidden_gradient",
    "pool_hidden_sums",
    "pool_layer_sums",
    "pool_query_sums",
    "pool_sums",
    "pool_wide_gradient",
    "pool_wide_hidden_gradient",
    "pool_wide_sums",
    "split_statistics",
    "split_normaliser",
    "split_sums",
    "mixture_split_sums",
    "mixture_split_slopes",
}
WRITERS = {
    *("forward_resident", "forward_looped", "split_output"),
    *("backward_resident", "backward_looped", "split_gradient"),
    *("mixture_backward_resident", "mixture_backward_looped", "mixture_split_gradient"),
    *("block_forward_resident", "block_backward_resident"),
    "additive_output",
    "pool_gradient",
    "pool_hidden_dx",
    "pool_wide_gradient",
}


def faults(name: str, target: str, kernel: dict) -> list[str]:
    """What a compiled kernel must not be: spilling, or on NVIDIA's GPUs narrow where its tensors are aligned."""
    found = []
    if kernel["spills"]:
        found.append(f"{kernel['spills']} spills")
    if target.startswith("gfx"):  # its compiler gives fewer elements to a thread
        return found
    if name == "block in columns" and kernel["name"] == "block_backward_resident":  # few_neighbours
        return found
    if kernel["warpgroup_products"]:  # reported to read beside shared memory where there are several, from Triton 3.6
        found.append(f"{kernel['warpgroup_products']} products by warpgroups")
    if CASES[name].aligned and kernel["name"] in READERS | WRITERS and not kernel["wide_loads"]:
        found.append("no 16-byte loads")
    if (
        name.startswith("additive, decoding") and kernel["name"] == "additive_output"
    ):  # one row of values for all threads
        return found
    if CASES[name].aligned and kernel["name"] in WRITERS and not kernel["wide_stores"]:
        found.append("no 16-byte stores")
    return found


class RecordingDriver:
    """Compiles for a target through the real JIT path, launches nothing, records every launch."""

    def __init__(self, target):
        from triton.backends.compiler import GPUTarget

        self.target, self.launches = GPUTarget(*target), []
        self.utils = types.SimpleNamespace(
            load_binary=lambda *a: (1, 1, 0, 0, 1024),
            unload_module=lambda m: None,
            get_device_properties=lambda d: dict(max_shared_mem=SHARED_BYTES[target[1]], multiprocessor_count=132),
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def set_current_device(self, device):
        pass

    def launcher_cls(self, src, metadata):
        def launch(gx, gy, gz, stream, function, packed, launch_metadata, enter, leave, *args):
            self.launches.append(
                types.SimpleNamespace(name=metadata.name, hash=metadata.hash, grid=(gx, gy, gz), src=src)
            )

        return launch

    def __enter__(self):
        from triton.runtime.driver import driver

        self._previous = driver._active
        driver.set_active(self)
        return self

    def __exit__(self, *exc):
        from triton.runtime.driver import driver

        driver._active = self._previous


def compile_case(name: str, dtype: str, target: str) -> list[dict]:
    """Statistics of every kernel that a forward and backward pass of the case launches on the target."""
    from triton.runtime.jit import JITFunction

    from daam_kernels import options
    from daam_kernels.kernels import density_backward, density_block, density_forward, launch, mixture_backward
    from daam_kernels.kernels.remembered import forget_launches
    from daam_kernels.ops.density_attention import new_stats

    modules = density_forward, density_backward, density_block, mixture_backward
    jitted = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    for function in jitted:
        function.device_caches.clear()
    launch.LIMIT_REGISTERS = TARGETS[target][0] == "cuda"
    forget_launches()
    case = CASES[name]
    if isinstance(case, AdditiveCase):
        return compile_additive(case, DTYPES[dtype], target)
    if isinstance(case, PoolCase):
        return compile_pool(case, DTYPES[dtype], target)
    x = torch.empty(case.shape, dtype=DTYPES[dtype])
    per_head = math.prod(case.shape[case.axis + 1 :]) if case.density == "gaussian" else case.gaussians
    parameters = torch.ones(case.heads, per_head), torch.ones(case.heads, per_head)
    mask = torch.ones(case.shape, dtype=torch.bool) if case.mask else None
    defaults = dict(padding_value=None, padding_stats="zero", normalize="clamp", eps=1e-8, residual=False)
    chosen = options.DensityOptions(case.axis, **{**defaults, **case.options}, density=case.density)
    cu_seqlens = None
    if case.sequences:
        count, max_seqlen = case.sequences
        cu_seqlens = torch.empty(count + 1, dtype=torch.int32)
        chosen = chosen._replace(max_seqlen=max_seqlen)
    log_shares = torch.zeros_like(parameters[0]) if case.density in ("mixture", "gate") else None
    stats = new_stats(x, parameters[0], cu_seqlens, chosen, "triton")
    stats = None if name in STRAIGHT or case.inference or not stats.numel() else stats
    with RecordingDriver(TARGETS[target]) as driver:
        if case.layers > 1:
            layers = [[t] * case.layers for t in parameters]
            density_block.block_forward(x, *layers, mask, chosen, torch.empty_like(x))
            density_block.block_backward(torch.empty_like(x), x, *layers, mask, chosen)
            return _statistics_of(driver.launches, jitted, target)
        weights = torch.empty_like(x) if case.weights else None
        last = log_shares, cu_seqlens
        density_forward.density_forward(x, *parameters, mask, chosen, torch.empty_like(x), weights, stats, *last)
        if not case.inference:
            density_backward.density_backward(torch.empty_like(x), x, *parameters, mask, stats, chosen, *last)
    kernels = _statistics_of(driver.launches, jitted, target)
    if name in STRAIGHT and target == "sm_90":
        kernels[0].update(_count_instructions(driver.launches[0], jitted))
    return kernels


def compile_additive(case: AdditiveCase, dtype: torch.dtype, target: str) -> list[dict]:
    """The same of a case of additive attention."""
    from triton.runtime.jit import JITFunction

    from daam_kernels.kernels import additive_backward, additive_forward, additive_host, additive_weights
    from daam_kernels.options import AdditiveProblem

    modules = additive_forward, additive_backward, additive_weights
    jitted = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
    for function in jitted:
        function.device_caches.clear()
    additive_host.ON_NVIDIA = TARGETS[target][0] == "cuda"
    batch, heads, queries, keys = case.shape
    query, key = (torch.empty((batch, heads, t, case.hidden), dtype=dtype) for t in (queries, keys))
    value = torch.empty((batch, heads, keys, case.value_dim), dtype=dtype)
    added = case.mask == "added"
    mask = torch.zeros(case.shape, dtype=torch.float32 if added else torch.bool) if case.mask else None
    key_mask = torch.zeros((batch, keys), dtype=torch.bool) if case.mask else None
    seed = torch.zeros(1, dtype=torch.int64) if case.dropout else None
    tensors = query, key, value, torch.empty((heads, case.hidden)), mask, key_mask, seed
    problem = AdditiveProblem(
        *tensors, case.causal, case.dropout, 1.0, case.fast, case.weights or case.average, case.average
    )
    with RecordingDriver(TARGETS[target]) as driver:
        output, lse, weights = additive_forward.additive_forward(problem)
        if weights is not None:
            weights = weights.expand(case.shape)
            additive_weights.additive_weights_delta(problem, lse, weights)
        additive_backward.additive_backward(problem, output, weights, lse, lse, added)
    return _statistics_of(driver.launches, jitted, target)


def compile_pool(case: PoolCase, dtype: torch.dtype, target: str) -> list[dict]:
    """The same of a case of attention pooling."""
    from triton.runtime.jit import JITFunction

    from daam_kernels.kernels import additive_host, attention_pool, attention_pool_host
    from daam_kernels.options import Pooling

    modules = attention_pool, attention_pool_host
    jitted = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
    for function in jitted:
        function.device_caches.clear()
    additive_host.ON_NVIDIA = TARGETS[target][0] == "cuda"
    bags, rows, embed_dim = case.shape
    x, cu_seqlens, valid, keep, grad_weights = torch.empty(case.shape, dtype=dtype), None, None, None, None
    if case.options:
        x, cu_seqlens = x.flatten(0, 1), torch.arange(0, bags * rows + 1, rows, dtype=torch.int32)
        valid = torch.ones(bags * rows, dtype=torch.bool)
        keep = torch.ones((case.hops, bags * rows), dtype=torch.bool)
        arithmetic = torch.promote_types(dtype, torch.float32)
        grad_weights = torch.empty(keep.shape, dtype=arithmetic)
    query, layers = torch.ones(case.hops, case.hidden or embed_dim), [None] * 4
    if case.hidden is not None:
        layers[0] = torch.ones(case.hidden, embed_dim)
    if case.gated:
        layers = [t.to(dtype) for t in (layers[0], query[0], layers[0], query[0])]
    tensors = x, query, *layers, valid, None, cu_seqlens, keep
    pooling = Pooling(*tensors, 1.0, 0.1 if case.options else 0.0, rows if case.options else None)
    with RecordingDriver(TARGETS[target]) as driver:
        context, lse = attention_pool.pool_forward(pooling, None)
        attention_pool.pool_backward(pooling, context, grad_weights, lse, lse)
    return _statistics_of(driver.launches, jitted, target)


def _statistics_of(launches, jitted, target: str) -> list[dict]:
    compiled = {}
    for function in jitted:
        for cache in function.device_caches.values():
            for kernel in cache[0].values():
                compiled[kernel.metadata.hash] = kernel
    return [dict(name=launch.name, **statistics(compiled[launch.hash], target)) for launch in launches]


def _count_instructions(launch, jitted) -> dict:
    """What a thread of a launched kernel takes, and the threads of the launch."""
    caches = (kernel for f in jitted for cache in f.device_caches.values() for kernel in cache[0].values())
    kernel = next(kernel for kernel in caches if kernel.metadata.hash == launch.hash)
    threads = math.prod(launch.grid) * 32 * kernel.metadata.num_warps
    return dict(threads=threads, shortest=instructions.count(_read_binary(kernel, "nvdisasm", "-c")))


def statistics(kernel, target: str) -> dict:
    """Registers, bytes of spills and widest accesses of the machine code.

    For NVIDIA from what the machine code asks for, and from the PTX, whose vectors are one access each: to disassemble
    a kernel takes as long as to compile it.
    """
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        return dict(
            registers=int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]),
            spills=int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1]),
            wide_loads=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", code)),
            wide_stores=len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", code)),
        )
    usage, code = _read_binary(kernel, "cuobjdump", "--dump-resource-usage"), kernel.asm["ptx"]
    vector = r"\.v(?:4\.[bfus]32|2\.[bfus]64)"
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        wide_loads=len(re.findall(rf"\bld\.global[.\w:]*{vector}|\bcp\.async\b[^;]*\b(?:16|0x10)\b", code)),
        wide_stores=len(re.findall(rf"\bst\.global[.\w:]*{vector}", code)),
        warpgroup_products=len(re.findall(r"\bwgmma\.mma_async", code)),
    )


def _read_binary(kernel, tool: str, *arguments: str) -> str:
    import triton

    binaries = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        return subprocess.run([binaries / tool, *arguments, path], capture_output=True, text=True, check=True).stdout


def _quiet_exit_of_workers() -> None:
    """Compiled kernels unload themselves through the driver at exit, which needs one to be there."""
    from triton.runtime.driver import driver

    driver.set_active(RecordingDriver(TARGETS["sm_90"]))


def compile_all(jobs: list[tuple[str, str, str]], workers: int) -> dict[tuple[str, str, str], list[dict]]:
    """The statistics of the kernels of every job, (case, type, target)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_exit_of_workers) as pool:
        return dict(zip(jobs, pool.map(compile_case, *zip(*jobs)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", action="store_true", help="leave out the cases that change the code only a little")
    parser.add_argument("--types", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=pathlib.Path, help="write the statistics of every kernel to this file")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, here and in the workers
    import triton

    jobs = CORE_JOBS if arguments.core else JOBS
    jobs = [job for job in jobs if job[1] in arguments.types and job[2] in arguments.targets]
    compiled = compile_all(jobs, arguments.workers)
    bad = 0
    for (name, dtype, target), kernels in compiled.items():
        for kernel in kernels:
            for fault in faults(name, target, kernel):
                bad += 1
                print(f"{name}, {dtype}, {target}: {kernel['name']}: {fault}, {kernel['registers']} registers")
    if arguments.json:
        rows = [dict(case=c, dtype=d, target=t, **k) for (c, d, t), kernels in compiled.items() for k in kernels]
        arguments.json.write_text(json.dumps(rows, indent=1))
    count = sum(map(len, compiled.values()))
    print(f"triton {triton.__version__}: {count} kernels compiled in {len(jobs)} jobs, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
