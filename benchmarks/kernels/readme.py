"""``python -m benchmarks readme``: write the table and picture of README.md anew, from the committed results."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Sequence

from ..report import Row, write_text
from .bare import BARE
from .contender import BOTH, FORWARD
from .contenders import (
    CLOSED_FORM_COMPILED,
    COPY,
    FRESH_COPY,
    FUSED,
    UPSTREAM,
    UPSTREAM_COMPILED,
    without_backend,
)
from .selection import DEFAULT_GAUSSIANS
from .shapes import SHAPES
from .store import load

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by python -m benchmarks readme -->", "<!-- until here -->"

_TITLES = {  # the shapes that the table has, where they were measured
    "wavlm": "WavLM", "llama": "LLaMA", "beit": "BEiT", "frames": "frames", "features": "features", "image": "image",
    "image_channels_last": "image, channels last", "long": "long",
}  # fmt: skip
_COLUMNS = {
    UPSTREAM: "public package", UPSTREAM_COMPILED: "compiled", CLOSED_FORM_COMPILED: "plain form, compiled",
    FUSED: "`density_attention`", BARE: "its kernel", COPY: "a copy", FRESH_COPY: "a copy into fresh memory",
}  # fmt: skip
_ON_GPU_ONLY = (CLOSED_FORM_COMPILED,)  # which a CPU's table has no room for: it is slower than the other one there
_WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This family has no options."""


def run(options: argparse.Namespace) -> int:
    """Write what lies between the two marks; returns the exit status."""
    path = ROOT / "README.md"
    write_text(path, replaced(path.read_text(encoding="utf-8"), section(RESULTS)))
    print("written: README.md")
    return 0


def replaced(text: str, part: str) -> str:
    """``text`` with ``part`` between the two marks; raises ValueError where it does not have each once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{part}{END}{rest.split(END)[1]}"


def section(folder: Path) -> str:
    """Introduction, table and picture for every device that has results in ``folder``, a GPU first."""
    gpu, cpu = folder / "kernels-cuda.json", folder / "kernels-cpu.json"
    parts = [_of_device(path) for path in (gpu, cpu) if path.exists()]
    if not gpu.exists():
        parts.append("No number from a GPU exists yet: `python -m benchmarks kernels --device cuda` makes them.\n\n")
    return "\n" + "".join(parts)


def _of_device(path: Path) -> str:
    results = load(path)
    environment = results["environment"]
    on_gpu = environment["cuda"] is not None
    rows = [row for row in results["rows"] if row["shape"] in _TITLES and _is_usual(row)]
    rows.sort(key=lambda row: list(_TITLES).index(row["shape"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    where = f"On {environment['device']}"
    if not on_gpu:
        where += f" with {environment['threads']} threads ({str(environment['instruction_set']).upper()})"
    unit = "microseconds on the device" if on_gpu else "milliseconds"
    text = (
        f"{where}, {' and '.join(dtypes)}, K = {DEFAULT_GAUSSIANS}, {unit}: forward / forward with backward. "
        "Medians of one run in which all took turns, after each result was checked. "
        f"torch {environment['torch']}, commit {environment['commit']}, {str(environment['date'])[:10]}."
    )
    parts = [*textwrap.wrap(text, _WIDTH, break_on_hyphens=False), "", *_table(rows, dtypes, on_gpu), ""]
    for dtype in dtypes:
        picture = f"benchmarks/results/{path.stem}-{dtype}-of-copy.png"
        parts += [f"![Fraction of the speed of a copy, shape by shape, {dtype}]({picture})", ""]
    return "\n".join(parts) + "\n" if rows else ""


def _is_usual(row: Row) -> bool:
    usual = SHAPES[row["shape"]]
    return (row["num_heads"], row["num_gaussians"]) == (usual.num_heads, DEFAULT_GAUSSIANS)


def _table(rows: Sequence[Row], dtypes: Sequence[str], on_gpu: bool) -> list[str]:
    times: dict[tuple[str, str, str, str], float] = {}
    for row in rows:
        time = row["kernel_us"] if on_gpu else row["wall_us"]
        if row["status"] == "ok" and time is not None:
            times[row["shape"], row["dtype"], without_backend(row["contender"]), row["direction"]] = time
    there = {contender for _, _, contender, _ in times}
    columns = [name for name in _COLUMNS if name in there and (on_gpu or name not in _ON_GPU_ONLY)]
    lines = [["shape, heads", *map(_COLUMNS.get, columns)], ["---"] * (len(columns) + 1)]
    scale = 1 if on_gpu else 1e-3
    for dtype in dtypes:
        for row in {row["shape"]: row for row in rows if row["dtype"] == dtype}.values():
            pairs = [
                " / ".join(_readable(times.get((row["shape"], dtype, name, d)), scale) for d in (FORWARD, BOTH))
                for name in columns
            ]
            lines.append([_label(row, dtype if len(dtypes) > 1 else None), *pairs])
    return [f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines]


def _label(row: Row, dtype: str | None) -> str:
    dims = row["dims"].split("x")
    axis = "last axis" if row["norm_axis"] % len(dims) == len(dims) - 1 else f"axis {row['norm_axis']}"
    of_type = f" {dtype}" if dtype else ""
    return f"{_TITLES[row['shape']]} [{', '.join(dims)}]{of_type}, {axis}, {row['num_heads']}"


def _readable(microseconds: float | None, scale: float) -> str:
    """Two digits or, from 10 on, no fraction; a dash where there is no right result."""
    if microseconds is None:
        return "–"
    value = microseconds * scale
    return format(value, ".0f" if value >= 9.95 else ".1f" if value >= 0.995 else ".2f")
