"""Calls launched by Triton and launched again past its dispatch, recorded: ``python tests/kernels/held.py``.

In a process of its own, because Triton's interpreter cannot be on, with a driver that launches nothing. Prints them as
JSON: of density attention each launch, with what Triton was asked to dispatch before it; of additive attention and of
attention pooling the launches of every call, as they were first, again, and once nothing was held any more.
"""

import contextlib
import itertools
import json
import math
import os
import sys

import aot
import torch


class LaunchingDriver(aot.RecordingDriver):
    """Records all that the launcher, which is C elsewhere, is called with."""

    device = stream = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def launcher_cls(self, src, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            known = [("pointer", a.data_ptr(), str(a.dtype)) if torch.is_tensor(a) else repr(a) for a in arguments]
            self.launches.append(dict(
                name=metadata.name, hash=metadata.hash, grid=(x, y, z), stream=stream, function=function,
                hook=getattr(enter, "__name__", None), metadata=launch_metadata is not None, arguments=known,
            ))  # fmt: skip

        return launch


def watch(metadata):
    """A hook, such as a profiler's."""


def main():
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    with LaunchingDriver(aot.TARGETS["sm_90"]) as driver:
        found = dict(density=density(driver), additive=additive(driver), pool=pool(driver), rules=rules(driver))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    aot._quiet_exit_of_workers()  # compiled kernels unload themselves through the driver at exit


def density(driver):
    from triton import knobs

    from daam_kernels.kernels import density_forward
    from daam_kernels.kernels.remembered import forget_launches
    from daam_kernels.options import DensityOptions

    dispatched, kernel = [], density_forward.forward_resident
    run = kernel.run

    def counted(*arguments, **named):
        dispatched.append(kernel.__name__)
        return run(*arguments, **named)

    kernel.run = counted
    memory = torch.zeros(4 * 64 + 4)
    aligned, shifted = memory[: 4 * 64].view(4, 64), memory[1 : 4 * 64 + 1].view(4, 64)
    y, parameters = torch.empty(96, 64), (torch.zeros(1, 2), torch.ones(1, 2))
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)

    def launch(x, parameters=parameters, weights=None):
        density_forward.density_forward(x, *parameters, None, options, y[: len(x)], weights, None)
        return {"dispatched": len(dispatched), **driver.launches[-1]}

    found = {"first": launch(aligned), "again": launch(aligned)}
    found["shifted"], found["shifted again"] = launch(shifted), launch(shifted)
    found["back"] = launch(aligned)
    doubles = tuple(p.double() for p in parameters)
    found["double parameters"], found["double parameters again"] = (
        launch(aligned, doubles),
        launch(aligned, doubles),
    )
    found["weights"], found["weights again"] = (launch(aligned, weights=torch.empty_like(aligned)) for _ in range(2))
    driver.stream = 7
    found["another stream"] = launch(aligned)
    before, knobs.runtime.launch_enter_hook = knobs.runtime.launch_enter_hook, watch
    found["with a hook"] = launch(aligned)
    knobs.runtime.launch_enter_hook = before
    kernel.pre_run_hooks.append(lambda *arguments, **named: None)
    found["with a hook before"] = launch(aligned)
    kernel.pre_run_hooks.clear()
    forget_launches()
    found["forgotten"] = launch(aligned)
    found["many"], found["more"] = (launch(torch.zeros(count, 64)) for count in (64, 96))
    return found


def additive(driver):
    """Forward and backward, with weights."""
    from daam_kernels.kernels import additive_backward, additive_forward, additive_weights
    from daam_kernels.options import AdditiveProblem

    def call(queries=32, keys=96, dtype=torch.float32, shift=0, masks=False):
        sizes = (2, 2, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16)
        query, key, value = (tensor(*size, dtype=dtype, shift=shift) for size in sizes)
        attn_mask = torch.zeros(queries, keys, dtype=torch.bool)[None, None] if masks else None
        key_mask = torch.zeros(2, keys, dtype=torch.bool) if masks else None
        tensors = query, key, value, torch.zeros(2, 16), attn_mask, key_mask, None
        problem = AdditiveProblem(*tensors, False, 0.0, 1.0, False, True, False)
        output, lse, weights = additive_forward.additive_forward(problem)
        additive_weights.additive_weights_delta(problem, lse, weights)
        additive_backward.additive_backward(problem, output, weights, lse, lse, False)

    return watched(driver, call, {
        "usual": {}, "other lengths": dict(queries=48, keys=128), "odd": dict(keys=97), "shifted": dict(shift=1),
        "bfloat16": dict(dtype=torch.bfloat16), "masks": dict(masks=True),
        "one query": dict(queries=1, keys=160), "one query, another step": dict(queries=1, keys=176),
    })  # fmt: skip


def pool(driver):
    """Forward and backward; with a hidden layer of several segments."""
    from daam_kernels.kernels import attention_pool, attention_pool_launch
    from daam_kernels.options import Pooling

    attention_pool_launch._HIDDEN_ELEMENTS = 64 * 2 * 16

    def call(
        score="dot", rows=(40, 40), max_seqlen=None, dtype=torch.float32, shift=0, valid=False, hops=2, columns=32
    ):
        total, packed = sum(rows), max_seqlen is not None
        shape = (total,) if packed else (len(rows), rows[0])
        x = tensor(*shape, columns, dtype=dtype, shift=shift)
        bounds = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32) if packed else None
        layers = [None] * 4 if score == "dot" else [tensor(16, columns), tensor(16)] * 2
        query = tensor(hops, columns if score == "dot" else 16)
        where = torch.ones(shape, dtype=torch.bool) if valid else None
        pooling = Pooling(x, query, *layers, where, None, bounds, None, 1.0, 0.0, max_seqlen)
        context, lse = attention_pool.pool_forward(pooling, None)
        attention_pool.pool_backward(pooling, context, None, lse, lse)

    packed = dict(rows=(30, 50), max_seqlen=64)
    gated = dict(packed, score="gated")
    return watched(driver, call, {
        "usual": {}, "other lengths": dict(rows=(56, 56)), "shifted": dict(shift=1), "half": dict(dtype=torch.float16),
        "packed": packed, "packed, other lengths": dict(rows=(61, 7), max_seqlen=64),
        "packed, other bags": dict(rows=(21, 7, 60), max_seqlen=64), "padded": dict(packed, valid=True),
        "gated": gated, "gated, other lengths": dict(gated, rows=(64, 37)),
        "wide": dict(gated, hops=9), "wide, other lengths": dict(gated, hops=9, rows=(64, 37)),
    })  # fmt: skip


def rules(driver):
    """Numbers of a call, another device, and a GPU of AMD's: how often Triton dispatched."""
    from daam_kernels.kernels import direct, host
    from daam_kernels.kernels.attention_pool_hidden_gradient import pool_layer_sums
    from daam_kernels.kernels.launch import Launch, launch_options
    from daam_kernels.kernels.remembered import forget_launches

    import triton.language as tl

    x = torch.zeros(64, 32)
    names = "x_ptr", "d_hidden_ptr", "d_weight_ptr", "d_bias_ptr"
    constants = dict(
        UNITS=16, E=32, VEC=1, PRECISION_BACK="ieee", ACC=tl.float32, BLOCK_R=16, BLOCK_U=16, BLOCK_S=16, x_stride_t=32
    )
    usual = dict(
        dict.fromkeys(names, x), valid_ptr=None, first_row=0, end_row=64, length=64, rows_each=64, x_stride_b=3
    )
    launch = Launch(constants, launch_options(4))

    def count(launch=launch, **numbers):
        with counting() as dispatched:
            host.run(pool_layer_sums, launch, usual | numbers, (1,))
        return len(dispatched)

    forget_launches()
    found = {"first": count(), "again": count(), "not specialised": count(length=65, rows_each=1)}
    found["64 bits"], found["64 bits again"] = count(length=1 << 31), count(length=1 << 40)
    found["one"], found["sixteenth"], found["neither"] = (count(x_stride_b=number) for number in (1, 32, 5))
    found["another launch"] = count(Launch(constants, launch_options(4)))
    found["another constant"] = count(Launch(constants | dict(E=64), launch_options(4)))
    found["of another type"] = count(Launch(constants | dict(VEC=True), launch_options(4)))
    found["more warps"] = count(Launch(constants, launch_options(8)))
    driver.device = 1
    found["another device"] = count(Launch(constants, launch_options(4)))
    driver.device, direct.HOLDS = 0, False
    amd = Launch(constants, launch_options(4))
    found["AMD"] = [count(amd), count(amd)]
    direct.HOLDS = True
    return found


def tensor(*shape, dtype=torch.float32, shift=0):
    """Whose address 16 divides, or not where it is shifted."""
    memory = torch.zeros(math.prod(shape) + shift, dtype=dtype)
    return memory[shift:].view(shape)


def watched(driver, call, cases):
    """The launches of every case in turn, twice, and how many of them were dispatched; then without what was held."""
    from daam_kernels.kernels.remembered import forget_launches

    def launches(case):
        driver.launches.clear()
        with counting() as dispatched:
            call(**case)
        return dict(dispatched=len(dispatched), launches=[without_addresses(launch) for launch in driver.launches])

    forget_launches()
    found = {name: dict(first=launches(case), again=launches(case)) for name, case in cases.items()}
    for name, case in cases.items():
        forget_launches()
        found[name]["alone"] = launches(case)
    return found


def without_addresses(launch):
    """What is allocated lies elsewhere in every call."""
    arguments = [one if isinstance(one, str) else (one[0], one[1] % 16, one[2]) for one in launch["arguments"]]
    return dict(launch, arguments=arguments)


@contextlib.contextmanager
def counting():
    """A list that gets the kernels that Triton dispatches inside."""
    from triton.runtime import JITFunction

    dispatched, run = [], JITFunction.run

    def counted(self, *arguments, **named):
        dispatched.append(self.fn.__name__)
        return run(self, *arguments, **named)

    JITFunction.run = counted
    try:
        yield dispatched
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    main()
