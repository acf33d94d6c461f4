"""Calls launched by Triton and launched again past its dispatch, recorded: ``python tests/kernels/held.py``.

In a process of its own, because Triton's interpreter cannot be on, with a driver that launches nothing. Prints a list
of launches as JSON, each with what Triton was asked to dispatch before it.
"""

import json
import os
import sys

import aot
import torch


class LaunchingDriver(aot.RecordingDriver):
    """Records all that the launcher, which is C elsewhere, is called with."""

    stream = 0

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
    y, parameters = torch.empty(4, 64), (torch.zeros(1, 2), torch.ones(1, 2))
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)

    def launch(x, parameters=parameters, weights=None):
        density_forward.density_forward(x, *parameters, None, options, y, weights, None)
        return {"dispatched": len(dispatched), **driver.launches[-1]}

    with LaunchingDriver(aot.TARGETS["sm_90"]) as driver:
        found = {"first": launch(aligned), "again": launch(aligned)}
        found["shifted"], found["shifted again"] = launch(shifted), launch(shifted)
        found["back"] = launch(aligned)
        doubles = tuple(p.double() for p in parameters)
        found["double parameters"], found["double parameters again"] = (
            launch(aligned, doubles),
            launch(aligned, doubles),
        )
        found["weights"], found["weights again"] = (launch(aligned, weights=torch.empty_like(y)) for _ in range(2))
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
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    aot._quiet_exit_of_workers()  # compiled kernels unload themselves through the driver at exit


if __name__ == "__main__":
    main()
