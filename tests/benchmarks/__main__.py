"""``python -m tests.benchmarks [NAME ...]``: run all benchmarks, or those named."""

from __future__ import annotations

import sys

from rich.console import Console

from . import measuring, steps, units

BENCHMARKS = {"measuring": measuring.run, "steps": steps.run, "units": units.run}


def main() -> None:
    """Run what is named on the command line."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    console = Console(width=120)
    for name in names:
        BENCHMARKS[name](console)


main()
