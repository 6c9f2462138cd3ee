"""``python -m tests.benchmarks [NAME ...]``: run all benchmarks, or those named."""

from __future__ import annotations

import sys

from .harness import pin

NAMES = ("measuring", "idle", "w1", "w2", "w3", "steps", "units", "parts", "memory", "gpu")


def main() -> None:
    """Run what is named on the command line."""
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    pin()
    from rich.console import Console

    from . import gpu, idle, measuring, memory, parts, sampled, steps, units

    console = Console(width=150)
    alone = {
        "measuring": measuring.run,
        "idle": idle.run,
        "steps": steps.run,
        "units": units.run,
        "parts": parts.run,
        "memory": memory.run,
        "gpu": gpu.run,
    }
    for name in names:
        if name in alone:
            alone[name](console)
        else:
            sampled.run(console, name)


main()
