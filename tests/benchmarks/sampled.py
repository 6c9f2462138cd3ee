"""A sampled step of three trainings: ours beside a bare one, the `add_histogram` loop and `wandb.watch`.

Every condition trains a model of its own. They take turns in blocks of a few steps, and each block is compared with
the bare block of the same round; a second bare training shows the noise of the machine. What waits to be written is
flushed at the end of a block, within its time, so that no thread works on into the next.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import instrument
from instrument.config import KINDS

from .harness import machine, resident, spread
from .workloads import WORKLOADS, Training, Workload

__all__ = ["run"]

SECONDS = 75.0
"""About as long is spent on each workload."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 40


class Condition:
    """A training as it is: nothing watches it.

    Args:
        training: The training.
        directory: Where to write.
    """

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        self.directory = directory
        self.steps = 0
        self.resident = 0
        self.walls: list[float] = []
        self.processors: list[float] = []

    def step(self) -> None:
        """One step."""
        self.training.step()

    def flush(self) -> None:
        """Wait for what is still to be written."""

    def elements(self) -> int:
        """Elements that a step measures."""
        return 0

    def close(self) -> None:
        """Let go."""

    def block(self, steps: int) -> None:
        """Train for some steps, and note seconds of wall clock and of this process for each."""
        before = resident()
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self.flush()
        self.walls.append((time.perf_counter() - wall) / steps)
        self.processors.append((time.process_time() - processor) / steps)
        self.resident += resident() - before
        self.steps += steps


class Ours(Condition):
    """Watched by this library, with what `watch` is to be given."""

    def __init__(self, training: Training, directory: Path, **arguments: Any) -> None:
        super().__init__(training, directory)
        self.watcher = instrument.watch(training.model, logdir=directory, **{"interval": 1, **arguments})

    def flush(self) -> None:
        self.watcher.flush()

    def elements(self) -> int:
        return sum(s.count + s.nan_count + s.inf_count for s in self.watcher.history[-1].values())

    def close(self) -> None:
        self.watcher.close()


class Loop(Condition):
    """The loop that people write: `add_histogram` for each parameter, gradient and, where asked for, leaf output."""

    def __init__(self, training: Training, directory: Path, activations: bool) -> None:
        super().__init__(training, directory)
        self.writer = torch.utils.tensorboard.SummaryWriter(directory)
        self._measured = 0
        for name, module in training.model.named_modules():
            if activations and not list(module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._add(f"Activations/{name}", output.detach())

        return hook

    def _add(self, tag: str, values: torch.Tensor) -> None:
        self._measured += values.numel()
        self.writer.add_histogram(tag, values, self.steps)

    def _parameters(self) -> None:
        for name, parameter in self.training.model.named_parameters():
            assert parameter.grad is not None
            self._add(f"Parameters/{name}", parameter.detach())
            self._add(f"Gradients/{name}", parameter.grad)

    def step(self) -> None:
        self._measured = 0
        self.training.step(self._parameters)

    def flush(self) -> None:
        self.writer.flush()

    def elements(self) -> int:
        return self._measured

    def close(self) -> None:
        self.writer.close()


class Wandb(Condition):
    """`wandb.watch(log="all")`, offline, on every step; its own process writes, and is in no column but the first."""

    def __init__(self, training: Training, directory: Path) -> None:
        super().__init__(training, directory)
        import wandb  # type: ignore[import-not-found, unused-ignore]  # optional, and not in the lists of this project

        directory.mkdir()
        settings = wandb.Settings(mode="offline", silent=True, console="off", root_dir=str(directory))
        self._run: Any = wandb.init(project="benchmark", settings=settings)
        self._run.watch(training.model, log="all", log_freq=1)

    def step(self) -> None:
        self.training.step()
        self._run.log({"step": self.steps})

    def elements(self) -> int:
        return 2 * sum(parameter.numel() for parameter in self.training.model.parameters())

    def close(self) -> None:
        self._run.finish()


class Row(NamedTuple):
    """A condition of the table."""

    title: str
    make: Callable[[Training, Path], Condition]
    rival: str | None = None
    """Title of the loop whose extra time is put in relation."""
    share: int = 1
    """Run in every n-th round only: the slow ones would take all the time."""


LOOP, LOOP_ACTIVATIONS = "add_histogram loop", "add_histogram loop + activations"
ROWS = [
    Row("bare", Condition),
    Row("null: bare again", Condition),
    Row("ours, not sampled", lambda t, d: Ours(t, d, interval=10**9, scalar_interval=10**9)),
    Row("ours, parameters + gradients", lambda t, d: Ours(t, d, kinds=["parameters", "gradients"]), LOOP),
    Row("ours, + activations", lambda t, d: Ours(t, d), LOOP_ACTIVATIONS),
    Row("ours, everything", lambda t, d: Ours(t, d, kinds=KINDS), LOOP_ACTIVATIONS),
    Row(LOOP, lambda t, d: Loop(t, d, activations=False), share=2),
    Row(LOOP_ACTIVATIONS, lambda t, d: Loop(t, d, activations=True), share=2),
]
if importlib.util.find_spec("wandb"):
    ROWS.append(Row("wandb.watch offline", Wandb, LOOP, share=2))


def run(console: Console, name: str, seconds: float = SECONDS) -> None:
    """Print the table of one workload.

    Args:
        console: Where to.
        name: "w1", "w2" or "w3".
        seconds: About how long to measure.
    """
    workload = WORKLOADS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory:
        conditions: dict[str, Condition] = {}
        try:
            for number, row in enumerate(ROWS):
                before = resident()
                training = workload.make()
                training.step()  # makes gradients and the optimizer's state, which are no cost of a watch
                made = resident() - before
                conditions[row.title] = condition = row.make(training, Path(directory, str(number)))
                condition.block(2)
                condition.resident = resident() - before - made
                condition.walls.clear()
                condition.processors.clear()
            rounds = _take_turns(conditions, workload, seconds)
            table = _table(conditions, f"{workload.title}\n{rounds} rounds of {workload.steps} steps; {machine()}")
        finally:
            for condition in conditions.values():
                condition.close()
            torch.set_num_threads(threads)
    console.print(table)


def _take_turns(conditions: dict[str, Condition], workload: Workload, seconds: float) -> int:
    shuffle = random.Random(0)
    started = time.monotonic()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            return number
        order = [row for row in ROWS if number % row.share == 0]
        shuffle.shuffle(order)
        for row in ROWS:
            if row in order:
                continue
            conditions[row.title].walls.append(float("nan"))
            conditions[row.title].processors.append(float("nan"))
        for row in order:
            conditions[row.title].block(1 if row.share > 1 else workload.steps)
    return MOST_ROUNDS


def _table(conditions: dict[str, Condition], title: str) -> Table:
    table = Table(title=title)
    table.add_column("sampling every step")
    for heading in (
        "wall ratio (quartiles)", "CPU ratio (quartiles)", "extra ms a step", "smaller than the loop's",
        "ns an element", "kB a step", "RSS +MiB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    bare = conditions["bare"]
    extras = {title: _extra(condition, bare) for title, condition in conditions.items()}
    for row in ROWS:
        condition, extra = conditions[row.title], extras[row.title]
        if condition is bare:
            medians = (1e3 * statistics.median(values) for values in (bare.walls, bare.processors))
            table.add_row(row.title, *(f"{median:.1f} ms" for median in medians))
            continue
        elements = condition.elements() if condition.elements() and "not sampled" not in row.title else 0
        written = sum(path.stat().st_size for path in condition.directory.rglob("*") if path.is_file())
        table.add_row(
            row.title,
            _ratio(condition.walls, bare.walls),
            _ratio(condition.processors, bare.processors),
            f"{1e3 * extra:.2f}",
            f"{extras[row.rival] / extra:.1f}" if row.rival and extra > 0 else "",
            f"{1e9 * extra / elements:.2f}" if elements else "",
            f"{written / condition.steps / 1e3:.1f}",
            f"{condition.resident / 2**20:.1f}",
        )
    return table


def _pairs(values: list[float], bare: list[float]) -> list[tuple[float, float]]:
    return [(value, base) for value, base in zip(values, bare, strict=True) if value == value]


def _extra(condition: Condition, bare: Condition) -> float:
    return statistics.median(value - base for value, base in _pairs(condition.walls, bare.walls))


def _ratio(values: list[float], bare: list[float]) -> str:
    found = spread([value / base for value, base in _pairs(values, bare)])
    return f"{found.median:.3f} ({found.low:.2f}..{found.high:.2f})"
