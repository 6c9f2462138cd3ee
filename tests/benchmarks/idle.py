"""Steps that are not sampled: microseconds that a watch adds, for models of 4, 40 and 400 modules.

All modules but one do nothing, so that a step is short and whatever a watch did for each module would be seen: one
hook that does nothing costs a microsecond a call.
"""

from __future__ import annotations

import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import instrument

from .harness import machine, spread

MODULES = (4, 40, 400)
STEPS = 50
"""Steps a block."""


class _Training:
    def __init__(self, modules: int) -> None:
        self.model = nn.Sequential(nn.Linear(4, 4), *(nn.Identity() for _ in range(modules - 2)))  # and the root
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._inputs = torch.ones(2, 4)

    def block(self) -> float:
        """Seconds a step, over a block."""
        model, optimizer, inputs = self.model, self._optimizer, self._inputs
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
        return (time.perf_counter() - start) / STEPS


def run(console: Console, rounds: int = 150) -> None:
    """Print the table, on one thread; the three take turns, and each comes first as often as last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(title=f"A step that is not sampled, {rounds} rounds of {STEPS} steps ({machine()})")
    for heading in ("modules", "bare, us", "what", "ratio", "quartiles", "us added", "quartiles"):
        table.add_column(heading, justify="right")
    for modules in MODULES:
        trainings = {name: _Training(modules) for name in ("bare", "null: bare again", "watched")}
        with tempfile.TemporaryDirectory() as directory:
            watcher = instrument.watch(
                trainings["watched"].model, interval=10**9, scalar_interval=10**9, logdir=directory
            )
            for training in trainings.values():
                training.block()
            found: dict[str, list[float]] = {name: [] for name in trainings}
            names = list(trainings)
            for number in range(rounds):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    found[name].append(trainings[name].block())
            watcher.close()
        bare = found.pop("bare")
        for name, values in found.items():
            ratio = spread([value / base for value, base in zip(values, bare, strict=True)])
            added = spread([1e6 * (value - base) for value, base in zip(values, bare, strict=True)])
            table.add_row(
                str(modules), f"{1e6 * spread(bare).median:.0f}", name, f"{ratio.median:.4f}",
                f"{ratio.low:.3f}..{ratio.high:.3f}", f"{added.median:.2f}", f"{added.low:.1f}..{added.high:.1f}",
            )  # fmt: skip
    torch.set_num_threads(threads)
    console.print(table)
