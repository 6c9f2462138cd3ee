"""A sampled step of three trainings: ours beside a bare one, the `add_histogram` loop and `wandb.watch`.

Every condition trains a model of its own. They take turns in blocks of a few steps, and each block is compared with
the bare block of the same round; a second bare training shows the noise of the machine. What waits to be written is
flushed at the end of a block, within its time, so that no thread works on into the next.

Where the tensors of a model lie is decided when they are made, and by that alone a step of 400 small layers is a tenth
faster or slower, for as long as the process lives. So several processes make all models anew, each in another order,
and the pairs of all are put together. What memory a watch takes cannot be told apart in such a company; `memory.py`
tells it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import instrument
from instrument.config import KINDS

from .harness import machine, spread
from .workloads import WORKLOADS, Training, Workload

__all__ = ["run"]

PROCESSES = 6
SECONDS = 20.0
"""About as long each process measures a workload."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 40


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
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self.flush()
        self.walls.append((time.perf_counter() - wall) / steps)
        self.processors.append((time.process_time() - processor) / steps)
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


class Result(NamedTuple):
    """What came of a condition, in one process or in all."""

    walls: list[float]
    """Seconds a step of each block; NaN where it was not its turn."""
    processors: list[float]
    elements: int
    """Elements that a step measures."""
    bytes: float
    """Written a step."""


def run(console: Console, name: str) -> None:
    """Print the table of one workload.

    Args:
        console: Where to.
        name: "w1", "w2" or "w3".
    """
    found: list[dict[str, Result]] = []
    for number in range(PROCESSES):
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.sampled", name, str(number)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append({title: Result(*result) for title, result in json.loads(answer.splitlines()[-1]).items()})
    results = {row.title: _together([each[row.title] for each in found]) for row in ROWS}
    workload = WORKLOADS[name]
    rounds = len(results["bare"].walls)
    threads = workload.threads or os.cpu_count() or 1
    title = f"{workload.title}\n{rounds} rounds of {workload.steps} steps in {PROCESSES} processes"
    console.print(_table(results, f"{title}; {machine(threads)}"))


def _together(results: list[Result]) -> Result:
    """What came of a condition in several processes."""
    return Result(
        [wall for result in results for wall in result.walls],
        [processor for result in results for processor in result.processors],
        results[0].elements,
        statistics.median(result.bytes for result in results),
    )


def measured(name: str, number: int) -> dict[str, Result]:
    """Measure one workload in this process.

    Args:
        name: "w1", "w2" or "w3".
        number: Of the process: it decides in which order models are made.

    Returns:
        What came of each condition.
    """
    workload = WORKLOADS[name]
    torch.set_num_threads(workload.threads or os.cpu_count() or 1)
    shuffle = random.Random(number)
    with tempfile.TemporaryDirectory() as directory:
        conditions: dict[str, Condition] = {}
        try:
            for place, row in enumerate(shuffle.sample(ROWS, len(ROWS))):
                training = workload.make()
                training.step()  # makes gradients and the optimizer's state, which are no cost of a watch
                conditions[row.title] = condition = row.make(training, Path(directory, str(place)))
                condition.block(2)
                condition.walls.clear()
                condition.processors.clear()
            _take_turns(conditions, workload, shuffle)
            return {title: _result(condition) for title, condition in conditions.items()}
        finally:
            for condition in conditions.values():
                condition.close()


def _result(condition: Condition) -> Result:
    written = sum(path.stat().st_size for path in condition.directory.rglob("*") if path.is_file())
    return Result(condition.walls, condition.processors, condition.elements(), written / condition.steps)


def _take_turns(conditions: dict[str, Condition], workload: Workload, shuffle: random.Random) -> None:
    started = time.monotonic()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() - started > SECONDS:
            return
        order = [row for row in ROWS if number % row.share == 0]
        shuffle.shuffle(order)
        for row in ROWS:
            if row in order:
                continue
            conditions[row.title].walls.append(float("nan"))
            conditions[row.title].processors.append(float("nan"))
        for row in order:
            conditions[row.title].block(1 if row.share > 1 else workload.steps)


def _table(results: Mapping[str, Result], title: str) -> Table:
    table = Table(title=title)
    table.add_column("sampling every step")
    for heading in (
        "wall ratio (quartiles)", "CPU ratio (quartiles)", "extra ms a step", "smaller than the loop's",
        "ns an element", "kB a step",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    bare = results["bare"]
    extras = {title: _extra(result, bare) for title, result in results.items()}
    for row in ROWS:
        result, extra = results[row.title], extras[row.title]
        if result is bare:
            medians = (1e3 * statistics.median(values) for values in (bare.walls, bare.processors))
            table.add_row(row.title, *(f"{median:.1f} ms" for median in medians))
            continue
        elements = result.elements if "not sampled" not in row.title else 0
        table.add_row(
            row.title,
            _ratio(result.walls, bare.walls),
            _ratio(result.processors, bare.processors),
            f"{1e3 * extra:.2f}",
            f"{extras[row.rival] / extra:.1f}" if row.rival and extra > 0 else "",
            f"{1e9 * extra / elements:.2f}" if elements else "",
            f"{result.bytes / 1e3:.1f}",
        )
    return table


def _pairs(values: list[float], bare: list[float]) -> list[tuple[float, float]]:
    return [(value, base) for value, base in zip(values, bare, strict=True) if value == value]


def _extra(result: Result, bare: Result) -> float:
    return statistics.median(value - base for value, base in _pairs(result.walls, bare.walls))


def _ratio(values: list[float], bare: list[float]) -> str:
    found = spread([value / base for value, base in _pairs(values, bare)])
    return f"{found.median:.3f} ({found.low:.2f}..{found.high:.2f})"


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
