"""Memory: that of the process over 10,000 sampled steps, bytes for each site, and bytes of a histogram on disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import nn

import instrument
from instrument.config import KINDS

from .harness import machine, resident
from .workloads import WORKLOADS

STEPS = (500, 1000, 2500, 5000, 10_000)


def run(console: Console) -> None:
    """Print the tables, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        console.print(_over_steps(Path(directory, "steps")))
        console.print(_a_site(Path(directory, "site")))
    torch.set_num_threads(threads)


def _over_steps(directory: Path) -> Table:
    """A tiny model with every kind sampled on every step."""
    table = Table(title=f"Resident memory over sampled steps of a tiny model ({machine()})")
    for heading in ("steps", "MiB", "since step 500, MiB"):
        table.add_column(heading, justify="right")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.ones(4, 4)
    first = 0
    with instrument.watch(model, kinds=KINDS, interval=1, logdir=directory) as watcher:
        for step in range(1, STEPS[-1] + 1):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            if step in STEPS:
                watcher.flush()
                gc.collect()
                first = first or resident()
                table.add_row(f"{step:,}", f"{resident() / 2**20:.1f}", f"{(resident() - first) / 2**20:+.2f}")
    return table


def _a_site(directory: Path) -> Table:
    """Many sites, with as many records kept as the default keeps."""
    table = Table(title="One site, by default settings; the model of 400 layers")
    for heading in ("sites", "records kept", "RSS kB a site", "histograms", "bytes a histogram on disk"):
        table.add_column(heading, justify="right")
    training = WORKLOADS["w3"].make()
    training.step()
    gc.collect()
    before = resident()
    with instrument.watch(training.model, interval=1, logdir=directory) as watcher:
        for _ in range(watcher.config.history + 2):
            training.step()
            watcher.flush()  # what is kept is asked for, not what waits for the disk
        gc.collect()
        grown, sites, kept = resident() - before, len(watcher.sites), len(watcher.history)
    sizes = [
        value.ByteSize()
        for path in directory.iterdir()
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.HasField("histo")
    ]
    table.add_row(
        f"{sites:,}", str(kept), f"{grown / sites / 1e3:.1f}", f"{len(sizes):,}", f"{sum(sizes) / len(sizes):.0f}"
    )
    return table
