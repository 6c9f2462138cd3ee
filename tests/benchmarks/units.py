"""A sampled step with unit statistics, and with findings too, over one with neither: they may add a quarter at most."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import machine, ratios
from .steps import example


def run(console: Console, rounds: int = 15, steps: int = 10) -> None:
    """Print the table: triplets train side by side, all watched: with neither, with units, with units and findings."""
    import torch
    from torch import nn

    import instrument

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    char_gpt = example("char_gpt")

    def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(
            nn.Linear(256, 512), activation(), nn.Linear(512, 512), activation(), nn.Linear(512, 10)
        )  # fmt: skip

    def cnn() -> nn.Module:
        layers: list[nn.Module] = []
        for channels, wider in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))

    generator = torch.Generator().manual_seed(0)
    rows, images = torch.randn(64, 256, generator=generator), torch.randn(16, 3, 32, 32, generator=generator)
    tokens = torch.randint(90, (32, 64), generator=generator)
    cases: list[tuple[str, Callable[[], Any], torch.Tensor]] = [
        ("MLP, ReLU, batch 64", lambda: mlp(nn.ReLU), rows),
        ("MLP, tanh, batch 64", lambda: mlp(nn.Tanh), rows),
        ("CNN with batch norm, 16 images", cnn, images),
        ("char GPT, 2,048 tokens", lambda: char_gpt.CharGPT(90, 64), tokens),
    ]
    table = Table(
        title=f"A sampled step : one without units and findings, {rounds} rounds of {steps} steps ({machine()}, on 1)"
    )
    for heading in ("model", "plain, ms", "with", "ratio", "quartiles", "added ms a step"):
        table.add_column(heading, justify="right")
    for title, make, batch in cases:
        with tempfile.TemporaryDirectory() as directory:
            twins = [_Twin(instrument, make, batch, f"{directory}/{what}", what) for what in ("", *WHAT)]
            timed = [[twin.seconds(steps) for twin in twins] for _ in range(rounds + 1)][1:]
            for twin in twins:
                twin.watcher.close()
        for place, what in enumerate(WHAT, 1):
            found = ratios([(row[0], row[place]) for row in timed])
            added = ratios([(1.0, 1e3 * (row[place] - row[0]) / steps) for row in timed])
            plain = 1e3 * sorted(row[0] for row in timed)[rounds // 2] / steps
            quartiles = f"{found.low:.3f} to {found.high:.3f}"
            table.add_row(title, f"{plain:.1f}", what, f"{found.median:.3f}", quartiles, f"{added.median:.2f}")
    torch.set_num_threads(threads)
    console.print(table)


WHAT = ("units", "units and findings")


class _Twin:
    """A model in training, watched at every step for scalars and every tenth for histograms."""

    def __init__(self, instrument: Any, make: Callable[[], Any], batch: Any, directory: str, what: str) -> None:
        import torch

        torch.manual_seed(0)
        self.model = make()
        self.batch = batch
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.watcher = instrument.watch(self.model, logdir=directory, interval=10, scalar_interval=1)
        if not what:
            session = self.watcher._session
            session.judge = session.collector.units.module_of_rows = lambda *_: None
            session.collector.units.silent = lambda _: ()
        if "findings" not in what:
            self.watcher._checkup = None

    def seconds(self, steps: int) -> float:
        """Seconds that some steps take."""
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.batch).square().mean().backward()
            self.optimizer.step()
        self.watcher.flush()  # what the background has to do is part of the cost
        return time.perf_counter() - start
