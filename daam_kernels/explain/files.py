"""Files that appear when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place at the end, or goes away if something raises."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # processes of two machines share their numbers
    try:
        with named_in_errors(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """The system names no file where a write fails, on a full disk for one: the error then names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # without a number a file would take the message's place
            error.filename = str(path)
        raise
