"""``python -m benchmarks FAMILY``: finds the family and runs it."""

from __future__ import annotations

import argparse
import signal
import sys

from .additive import cli as additive
from .alignment import cli as alignment
from .bags import cli as bags
from .environment import INTERRUPTED
from .host import cli as host
from .kernels import cli as kernels
from .kernels import compare, page, readme
from .pool import cli as pool
from .quickstart import cli as quickstart
from .tune import cli as tune
from .verify import cli as verify

_FAMILIES = {
    "additive": additive,
    "alignment": alignment,
    "bags": bags,
    "compare": compare,
    "host": host,
    "kernels": kernels,
    "pool": pool,
    "quickstart": quickstart,
    "readme": readme,
    "report": page,
    "tune": tune,
    "verify": verify,
}
_EXTRAS = {"tqdm", "matplotlib", "gaussian_adaptive_attention", "sklearn"}


def main(arguments: list[str] | None = None) -> int:
    """Run one family; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of daam_kernels.")
    families = parser.add_subparsers(dest="family", required=True)
    for name, family in _FAMILIES.items():
        summary = family.__doc__.split(": ", 1)[1].splitlines()[0]
        family.add_arguments(families.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        return _FAMILIES[options.family].run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in _EXTRAS:
            raise
        extra = options.family if options.family in ("bags", "quickstart") else "benchmarks"
        install = f'pip install -c constraints.txt ".[{extra}]"'
        print(f"{missing} is not installed; in the repository root: {install}", file=sys.stderr)
        return 1
    except OSError as error:  # such as a full disk
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept, children end
    sys.exit(main())
