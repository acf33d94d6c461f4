"""``python -m benchmarks.verify.machine``: where this runs, and whether the device serves what is about to be asked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from daam_kernels import available_backends, density_attention, env

from ..environment import describe
from ..report import write_json


def main(arguments: list[str] | None = None) -> int:
    """Print the page of ``daam_kernels.env``, write the environment of the benchmarks, and call the operator once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify.machine", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    print(env.report(), flush=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here")
        return 1
    device = torch.device(options.device)
    write_json(options.out, describe(device))
    x, parameter = torch.randn(4, 64, device=device), torch.ones(2, 3, device=device)
    if not density_attention(x, 0 * parameter, parameter).isfinite().all():
        print("density_attention gives what is not finite")
        return 1
    if device.type == "cuda":
        backends = available_backends()  # with CUDA started, so that the compiled kernels have to load
        print("\n".join(f"{name}: {status.reason}" for name, status in backends.items()))
        return int(not backends["triton"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
