"""Readings and statuses of units made by hand, for diagnostics that see nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from instrument.config import Config
from instrument.diagnose.diagnostics import Diagnostic
from instrument.diagnose.findings import Finding
from instrument.diagnose.readings import ParameterTraits, Reading
from instrument.diagnose.units import UnitStatus
from instrument.record.tags import Tag

MATRIX = ParameterTraits(ndim=2, requires_grad=True)


def reading(step: int, values: Mapping[tuple[str, str, str], float], **more: Any) -> Reading:
    """A reading of (kind, statistic, name) to value."""
    return Reading(step, {Tag(*key): value for key, value in values.items()}, **more)


def series(values: Sequence[Mapping[tuple[str, str, str], float]], **more: Any) -> list[Reading]:
    """Readings of steps 0, 10, 20 ..."""
    return [reading(10 * number, found, **more) for number, found in enumerate(values)]


def ask(diagnostic: Diagnostic, readings: Sequence[Reading], **thresholds: Any) -> list[Finding]:
    """What a diagnostic has to say of readings."""
    return list(diagnostic(readings, Config(**thresholds)))


def status(name: str = "act", **changes: Any) -> UnitStatus:
    """Ten units of which none is dead, judged over a full window."""
    values: dict[str, Any] = {
        "name": name, "function": "relu", "units": 10, "dead": (), "constant": (), "rare": (), "always_on": (),
        "saturated": (0.0,) * 10, "rate": (0.5,) * 10, "samples": 4096, "batches": 64, "rate_bound": 3 / 4096,
        "verdict": "ok", "first_step": 0, "last_step": 100, "windows": 0, "births": (), "deaths": (),
        "still_dead": None,
    }  # fmt: skip
    return UnitStatus(**{**values, **changes})
