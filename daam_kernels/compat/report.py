"""What fuse and unfuse did, in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class FusionReport:
    """What fuse or unfuse did, by the path of the module in the model, ``""`` being the model itself.

    swapped: the classes, as in "GaussianBlock -> FusedDensityBlock". skipped: why a module was left as it is.
    notes: what a swapped module does otherwise than the original, where that may matter.
    """

    swapped: dict[str, str]
    skipped: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} module(s) swapped, {len(self.skipped)} skipped"]
        for path, classes in self.swapped.items():
            note = self.notes.get(path)
            lines.append(f"  {path or '(the model)'}: {classes}" + (f"; {note}" if note else ""))
        lines += [f"  {path or '(the model)'}: skipped, {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def classes(before: nn.Module, after: nn.Module) -> str:
    """Both classes by name, and by module where the names are the same."""
    old, new = type(before), type(after)
    if old.__name__ == new.__name__:
        return f"{old.__name__} -> {new.__module__.partition('.')[0]}'s {new.__name__}"
    return f"{old.__name__} -> {new.__name__}"
