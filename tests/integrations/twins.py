"""What a training left behind, and two of them compared bit by bit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import instrument
from instrument.capture.patterns import Patterns


class Trained(NamedTuple):
    """What a training left behind."""

    losses: list[float]
    norms: list[dict[str, float]]
    """For each optimizer step the norm of each gradient that it used, by parameter."""
    state: dict[str, torch.Tensor]
    randomness: torch.Tensor


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norms of the gradients that are there, in float64, by parameter."""
    return {
        name: float(parameter.grad.double().square().sum().sqrt())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def trained(model: nn.Module, losses: list[float], norms: list[dict[str, float]]) -> Trained:
    """What is left behind now."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Trained(losses, norms, state, torch.get_rng_state())


def assert_same_bits(watched: Trained, plain: Trained) -> None:
    """Losses, final parameters and random state are the same to the last bit."""
    assert len(plain.losses) > 1
    assert [loss.hex() for loss in watched.losses] == [loss.hex() for loss in plain.losses]
    assert list(watched.state) == list(plain.state)
    assert all(torch.equal(watched.state[name], value) for name, value in plain.state.items())
    assert torch.equal(watched.randomness, plain.randomness)


def assert_gradients(history: Iterable[instrument.StepRecord], plain: Trained, include: str, first: int = 0) -> None:
    """Each record has exactly the selected gradients, with the norms that the plain training has used."""
    selected = Patterns([include])
    records = list(history)
    assert [record.step for record in records] == list(range(first, first + len(plain.norms)))
    for record, norms in zip(records, plain.norms, strict=True):
        found = {tag.partition("/")[2]: sketch.l2 for tag, sketch in record.items() if tag.startswith("Gradients/")}
        expected = {name: norm for name, norm in norms.items() if selected.match(name)}
        assert expected
        assert found == {name: pytest.approx(norm, rel=1e-5, abs=1e-12) for name, norm in expected.items()}


def activations(record: instrument.StepRecord) -> dict[str, int]:
    """Names of the outputs in a record, and how many values were measured of each."""
    return {tag.partition("/")[2]: sketch.count for tag, sketch in record.items() if tag.startswith("Activations/")}


def modules_below(model: nn.Module, pattern: str) -> set[str]:
    """Names of the modules that match a regular expression or lie below one that does."""
    matches = re.compile(rf"({pattern})(\..*)?").fullmatch
    return {name for name, _ in model.named_modules() if matches(name)}


def event_files(directory: Path) -> list[Path]:
    """Every event file below a directory."""
    return sorted(path for path in directory.rglob("*") if "tfevents" in path.name)
