"""What is imported where it is needed: NumPy and tqdm."""

from __future__ import annotations

from typing import Any


def numpy_for(caller: str) -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            f"{caller} needs NumPy for arrays and files, which could not be imported ({error}): pip install numpy, "
            "or pass torch tensors to calculate_attention"
        ) from error
    return numpy


def bar(epochs: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            f"fit shows its progress with tqdm, which could not be imported ({error}): "
            "pip install 'daam_kernels[explain]', or pass progress=False"
        ) from error
    return tqdm(range(epochs), unit="epoch", dynamic_ncols=True)
