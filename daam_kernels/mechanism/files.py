"""The file of a mechanism: one ``.npz``, its arrays by name and a description in JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from ..explain.files import complete
from .extras import numpy_for

_FORMAT = 1


def write(path: str | os.PathLike[str], description: dict, contents: dict[str, Any]) -> Path:
    """One array for each of the contents, which are tensors or arrays already; bfloat16, which NumPy lacks, in more."""
    numpy, path = numpy_for("save"), _checked(path)
    tensors = {name: t.detach().cpu() for name, t in contents.items() if isinstance(t, Tensor)}
    tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    arrays = contents | {name: t.numpy() for name, t in tensors.items()}
    described = numpy.array(json.dumps({"format": _FORMAT, **description}))
    with complete(path) as part, open(part, "wb") as file:
        numpy.savez(file, description=described, **arrays)
    return path


def read(path: str | os.PathLike[str]) -> tuple[dict, dict[str, Any]]:
    """(description, arrays) of what :func:`write` wrote; ValueError for any other file."""
    numpy, path = numpy_for("load"), _checked(path)
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(str(arrays.pop("description")))
        found = description["format"]
    except (ValueError, EOFError, BadZipFile, LookupError, TypeError, AttributeError):
        raise ValueError(f"path must be a file that AttentionMechanism.save wrote, got {os.fspath(path)!r}") from None
    if found != _FORMAT:
        raise ValueError(f"path must be a file of format {_FORMAT}, got one of format {found}")
    return description, arrays


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {os.fspath(path)!r}")
    return path
