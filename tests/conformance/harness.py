"""Twins: the same training with and without the watch, compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import instrument
from instrument.config import KINDS


class Trained(NamedTuple):
    """What a training left behind."""

    model: nn.Module
    losses: list[float]
    state: dict[str, torch.Tensor]
    records: tuple[instrument.StepRecord, ...]
    notices: tuple[str, ...]
    randomness: torch.Tensor


Step = Callable[[nn.Module, torch.optim.Optimizer, int], torch.Tensor]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    """One ordinary step on data that depends on its number alone."""
    optimizer.zero_grad()
    loss: torch.Tensor = model(data(step)).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def data(step: int, size: int = 6, features: int = 4) -> torch.Tensor:
    """Input that depends on the step alone."""
    return torch.randn(size, features, generator=torch.Generator().manual_seed(100 + step))


def train(
    make: Callable[[], nn.Module],
    logdir: Path | None,
    step: Step = plain_step,
    steps: int = 4,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    **arguments: Any,
) -> Trained:
    """Train; watched where there is a directory, with every kind on every step and faults raised."""
    torch.manual_seed(3)
    model = make()
    chosen = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.05)
    watcher = None
    if logdir is not None:
        arguments = {"kinds": KINDS, "interval": 1, "strict": True, **arguments}
        watcher = instrument.watch(model, logdir=logdir, **arguments)
    losses = [step(model, chosen, number).item() for number in range(steps)]
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    records, notices = (watcher.history, watcher.notices) if watcher else ((), ())
    randomness = torch.get_rng_state()
    if watcher:
        watcher.close()
    return Trained(model, losses, state, records, notices, randomness)


def twins(
    make: Callable[[], nn.Module], logdir: Path, step: Step = plain_step, steps: int = 4, **arguments: Any
) -> Trained:
    """Train with and without the watch, compare every bit, and give the watched one."""
    bare = train(make, None, step, steps, arguments.get("optimizer"))
    watched = train(make, logdir, step, steps, **arguments)
    assert [float(loss).hex() for loss in watched.losses] == [float(loss).hex() for loss in bare.losses]
    assert list(watched.state) == list(bare.state)
    for name, value in bare.state.items():
        assert torch.equal(watched.state[name], value) or value.isnan().any(), name
    assert torch.equal(watched.randomness, bare.randomness)
    return watched


def of_kind(record: instrument.StepRecord, section: str) -> dict[str, instrument.Sketch]:
    """The sketches of one section of tags, by name."""
    return {tag.split("/", 1)[1]: sketch for tag, sketch in record.items() if tag.split("/", 1)[0] == section}
