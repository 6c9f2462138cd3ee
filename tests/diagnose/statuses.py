"""Statuses of units, and runs that hold them, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from instrument.diagnose.units import UnitStatus, encode
from instrument.record.documents import UNITS_TAG, document
from instrument.record.writer import SummaryWriter

Statuses = Mapping[str, UnitStatus]


def status(name: str, rate: Sequence[float], step: int, **changes: Any) -> UnitStatus:
    """A status of units with these rates; those that never fired are dead."""
    dead = tuple(unit for unit, value in enumerate(rate) if value == 0)
    values: dict[str, Any] = {
        "name": name, "function": "relu", "units": len(rate), "dead": dead, "constant": (), "rare": (),
        "always_on": (), "saturated": tuple(1 - value for value in rate), "rate": tuple(rate), "samples": 4096,
        "batches": 64, "rate_bound": 3 / 4096, "verdict": "dead" if dead else "ok", "first_step": step - 40,
        "last_step": step, "windows": 1 if dead else 0, "births": (), "deaths": (), "still_dead": None,
    }  # fmt: skip
    return UnitStatus(**{**values, **changes})


def write_values(logdir: Path, step_values: Mapping[int, Sequence[Summary.Value]]) -> Path:
    """A run with these values at these steps."""
    with SummaryWriter(logdir) as writer:
        for step, values in step_values.items():
            writer._get_file_writer().add_event(Event(summary=Summary(value=values)), step)
    return logdir


def write_units(logdir: Path, flushes: Mapping[int, Statuses]) -> Path:
    """A run with these statuses at these steps."""
    scalar = Summary.Value(tag="Activations.rms/relu", simple_value=1.0)
    return write_values(
        logdir, {step: [scalar, document(UNITS_TAG, encode(statuses))] for step, statuses in flushes.items()}
    )
