"""What compute-sanitizer's log says: which kernels it complains of, and whether they are ours."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_REPORT = re.compile(r"^=+ (?!    )(.*(?:Invalid|Uninitialized|Race|Barrier|Misaligned|Leaked).*)$", re.IGNORECASE)
_PLACE = re.compile(r"\bat (?:0x[0-9a-f]+ in )?(.+?)(?:\+0x[0-9a-f]+)?(?: in \S+)?$", re.IGNORECASE)
_FOREIGN = re.compile(r"at::|c10::|cub::|thrust::|cutlass|cublas|cudnn|gemm|splitKreduce", re.IGNORECASE)
_UNSUPPORTED = re.compile(r"device not supported|not supported on this (?:device|system)", re.IGNORECASE)


class Report(NamedTuple):
    """``ours`` and ``foreign``: complaints of kernels of this package and of others, "what at which kernel", counted.

    ``finished``: whether it came to its summary; ``unsupported``: whether it cannot watch this device.
    """

    ours: Counter
    foreign: Counter
    finished: bool
    unsupported: bool


def parse(log: str) -> Report:
    """The report of one run. What cannot be told apart is counted as ours."""
    ours, foreign = Counter(), Counter()
    lines = log.splitlines()
    for number, line in enumerate(lines):
        found = _REPORT.match(line)
        if not found or "SUMMARY" in line:
            continue
        title, kernel = found[1].strip(), "an unknown kernel"
        for near in (line, *lines[number + 1 : number + 3]):
            place = _PLACE.search(near.strip())
            if place:
                kernel = place[1].strip()
                break
        title = title.split(" at ")[0]
        (foreign if _FOREIGN.search(kernel) else ours)[f"{title} at {kernel}"] += 1
    summaries = [int(count) for count in _SUMMARY.findall(log)]
    if any(summaries) and not ours and not foreign:
        ours[f"{max(summaries)} errors, which the log has"] += 1
    return Report(ours, foreign, bool(summaries), bool(_UNSUPPORTED.search(log)))
