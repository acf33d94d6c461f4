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
    """``ours``: errors of this package's kernels, "what at which kernel", counted; ``others``: those of other packages'
    kernels, and warnings: of races that may be meant to be.

    ``finished``: whether it came to its summary; ``unsupported``: whether it cannot watch this device.
    """

    ours: Counter
    others: Counter
    finished: bool
    unsupported: bool


def parse(log: str) -> Report:
    """The report of one run. What cannot be told apart is counted as ours."""
    ours, others = Counter(), Counter()
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
        (others if _FOREIGN.search(kernel) or title.startswith("Warning") else ours)[f"{title} at {kernel}"] += 1
    summaries = [int(count) for count in _SUMMARY.findall(log)]
    if any(summaries) and not ours and not others:
        ours[f"{max(summaries)} errors, which the log has"] += 1
    return Report(ours, others, bool(summaries), bool(_UNSUPPORTED.search(log)))
