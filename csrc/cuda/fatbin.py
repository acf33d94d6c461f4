"""The one command that compiles the CUDA kernels: for setup.py, which runs it where nvcc is, and for the tests."""

from pathlib import Path

SOURCE = Path(__file__).with_name("density.cu")
ARCHITECTURES = (80, 90, 100)  # as machine code; any other device from 8.0 on compiles the PTX when it is loaded


def command(nvcc: str, output: str) -> list[str]:
    """Compiles ``density.cu`` to the fat binary ``output``."""
    lowest = f"compute_{ARCHITECTURES[0]}"
    codes = ",".join([lowest, *(f"sm_{a}" for a in ARCHITECTURES)])
    target = f"-gencode=arch={lowest},code=[{codes}]"  # one pass of the front end, which is half of the time
    return [nvcc, "-fatbin", "-O3", "-std=c++17", "--threads", "2", target, "-o", output, str(SOURCE)]
