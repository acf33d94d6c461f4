"""The results of one case and direction as text, for the terminal."""

from __future__ import annotations

from ..report import format_table
from .bare import BARE, BARE_FRESH, BARE_HUGE
from .cell import Cell
from .contender import FORWARD


def section(group: list[Cell]) -> str:
    """The table of one case and direction, and below it what fresh memory costs where that was measured."""
    first = group[0]
    on_gpu = any(cell.kernel_us is not None for cell in group)
    backward = first.direction != FORWARD
    header = ["contender", *(["kernel us", "IQR"] if on_gpu else []), "wall us", "IQR", "GB/s", "of copy", "x upstream"]
    header += ["error y", *(["dx", "parameters", "saved MB"] if backward else []), "peak MB"]
    header += [*(["launches"] if on_gpu else []), ""]
    lines = []
    for c in group:
        line = [c.contender, *([_time(c.kernel_us), _time(c.kernel_us_iqr)] if on_gpu else [])]
        line += [_time(c.wall_us), _time(c.wall_us_iqr), _number(c.gb_per_s, ".1f")]
        line += [_number(c.of_copy, ".3f"), _number(c.over_upstream, ".1f"), _number(c.error_y, ".0e")]
        if backward:
            line += [_number(c.error_dx, ".0e"), _number(c.error_parameters, ".0e"), _megabytes(c.saved_mb)]
        line += [_megabytes(c.peak_mb), *([_number(c.launches, "d")] if on_gpu else [])]
        lines.append([*line, "" if c.status == "ok" and not c.note else f"{c.status}: {c.note}"])
    layers = f"{first.layers} layers, " if first.layers > 1 else ""
    title = f"{first.shape} [{first.dims}] {first.dtype}, {first.operator}, axis {first.norm_axis}, "
    title += f"{first.num_heads} heads, {layers}"
    text = f"\n{title}K = {first.num_gaussians}, {first.direction}\n{format_table(header, lines)}"
    fresh = _fresh_memory({cell.contender: cell.wall_us for cell in group if cell.status == "ok"})
    return f"{text}\n{fresh}" if fresh else text


def _fresh_memory(times: dict[str, float | None]) -> str | None:
    """What outputs made anew cost on top of the kernel, from microseconds by contender; None where it was not timed."""
    kernel, fresh, huge = (times.get(name) for name in (BARE, BARE_FRESH, BARE_HUGE))
    if kernel is None or fresh is None:
        return None
    text = f"kernel alone {kernel / 1e3:.1f} ms, into fresh memory {_more(fresh, kernel)}"
    return text if huge is None else f"{text}, with DAAM_KERNELS_HUGE_PAGES=1 {_more(huge, kernel)}"


def _more(microseconds: float, than: float) -> str:
    return f"{microseconds / 1e3:.1f} ms ({(microseconds - than) / 1e3:+.1f})"


def _time(microseconds: float | None) -> str:
    return _number(microseconds, ".1f" if microseconds is not None and microseconds < 1000 else ".0f")


def _megabytes(value: float | None) -> str:
    """With as many decimals as leave a small shape something to show."""
    return _number(value, ".3f" if value is not None and value < 1 else ".1f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
