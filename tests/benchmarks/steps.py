"""A whole training step: with the watch over without it, for the defaults and the presets, on the demo's model."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import machine, ratios

PROJECT = Path(__file__).parents[2]


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(console: Console, rounds: int = 12) -> None:
    """Print the table: twins train side by side, one of them watched, over one whole interval a round."""
    import torch
    from torch.nn import functional

    import instrument

    char_gpt = example("char_gpt")
    tokens = torch.randint(90, (32, 65), generator=torch.Generator().manual_seed(0))

    def twin() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = char_gpt.CharGPT(90, 64)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(model: Any, optimizer: Any, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return time.perf_counter() - start

    table = Table(title=f"A step with the watch : without, {rounds} pairs ({machine()})")
    for heading in ("what", "ratio", "quartiles"):
        table.add_column(heading, justify="right")
    cases: list[tuple[str, dict[str, Any] | None, int]] = [
        ("nothing watched (noise of the machine)", None, 10),
        ("unsampled steps", {"interval": 10**9, "config": {"scalar_interval": 10**9}}, 10),
        ("defaults, every 100 steps", {}, 100),
        ("configs/light.json, every 500 steps", {"config": PROJECT / "configs" / "light.json"}, 100),
        ("configs/full.json, every step", {"config": PROJECT / "configs" / "full.json"}, 20),
        ("defaults, every step", {"interval": 1}, 5),
        ("parameters and gradients, every step", {"interval": 1, "kinds": ["parameters", "gradients"]}, 5),
    ]
    for title, arguments, steps in cases:
        bare, watched = twin(), twin()
        with tempfile.TemporaryDirectory() as directory:
            watcher = None
            if arguments is not None:
                watcher = instrument.watch(watched[0], logdir=directory, **arguments)
            train(*bare, 1)
            train(*watched, 1)
            pairs = [(train(*bare, steps), train(*watched, steps)) for _ in range(rounds if steps < 100 else 6)]
            if watcher is not None:
                watcher.close()
        found = ratios(pairs)
        table.add_row(title, f"{found.median:.3f}", f"{found.low:.3f} to {found.high:.3f}")
    console.print(table)
