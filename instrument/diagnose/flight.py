"""The flight recorder: the last readings before an accident, in one file beside the event files.

An accident is a non-finite value, a spike, or an exception that ended the training. The file has one JSON object a
line: first the accident, then the readings, oldest first, and after NaN or Inf those that followed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instrument.capture.names import Site
from instrument.diagnose.findings import Finding
from instrument.diagnose.readings import Reading
from instrument.errors import RunError
from instrument.record.tags import Tag, parse_tag, tag_of

__all__ = ["FLIGHT_FILE", "Accident", "FlightRecorder", "Growth", "grew_first", "read_flight"]

FLIGHT_FILE = "flight_recorder.jsonl"
FORMAT = 1

_RANKS = {"non_finite": 2, "loss_spike": 1, "gradient_spike": 1, "exception": 1}
"""What an accident is called, and what gives way to what: a spike is no reason to forget the first NaN."""

_GROWN = 10.0
"""A tensor has grown when its largest magnitude is this many times what it was, and stays so."""

_BASELINE = 4
"""Readings that it takes, at least, to say what a magnitude was."""


@dataclasses.dataclass(frozen=True)
class Accident:
    """What happened, and when."""

    reason: str
    """Name of the diagnostic, or "exception"."""
    step: int
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Growth:
    """A tensor that grew before an accident."""

    site: Site
    step: int
    """First reading on which it was ten times what it had been, and stayed so."""
    factor: float
    """How many times what it had been it was in the end."""
    values: tuple[tuple[int, float], ...]
    """Step and largest magnitude of the last readings."""

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "kind": self.site.kind,
            "name": self.site.name,
            "step": self.step,
            "factor": self.factor,
            "values": [list(pair) for pair in self.values],
        }


class FlightRecorder:
    """Writes the file when there was an accident; called in the background.

    Args:
        directory: Where the file goes; None where there is none.
        following: Readings after a non-finite value that are added.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, following: int) -> None:
        self.accident: Accident | None = None
        """The accident that the file is about."""
        self._path = Path(directory) / FLIGHT_FILE if directory is not None else None
        self._following = following
        self._kept: list[Reading] = []
        self._to_come = 0

    def see(self, readings: Sequence[Reading], told: Iterable[Finding]) -> None:
        """Look whether the newest reading is that of an accident, or one that follows.

        Args:
            readings: The last readings, oldest first.
            told: Findings that are new on the newest.
        """
        found = [finding for finding in told if finding.diagnostic in _RANKS]
        if found:
            worst = max(found, key=lambda finding: _RANKS[finding.diagnostic])
            self.happened(Accident(worst.diagnostic, worst.step, str(worst)), readings)
        elif self._to_come:
            self._to_come -= 1
            self._kept.append(readings[-1])
            if not self._to_come:
                self._write()

    def happened(self, accident: Accident, readings: Sequence[Reading]) -> None:
        """Write the readings before an accident, unless the file is about a worse one."""
        if self.accident is not None and _RANKS[self.accident.reason] > _RANKS[accident.reason]:
            return
        self.accident, self._kept = accident, list(readings)
        self._to_come = self._following if accident.reason == "non_finite" else 0
        self._write()

    def close(self) -> None:
        """Write what has followed so far."""
        if self._to_come:
            self._to_come = 0
            self._write()

    def _write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None or self.accident is None:
            return
        lines = [{"format": FORMAT, **self.accident.as_dict()}, *map(_as_line, self._kept)]
        text = "".join(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n" for line in lines)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
        if not self._to_come:
            self._kept = []


def _as_line(reading: Reading) -> dict[str, Any]:
    values = {tag_of(Site(kind, name), what): _finite(value) for (kind, what, name), value in reading.values.items()}
    return {"step": reading.step, "loss": _finite(reading.loss), "values": values}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_flight(directory: Path) -> tuple[Accident, list[Reading]] | None:
    """Read the file of a run back.

    Args:
        directory: That of the event files.

    Returns:
        The accident and the readings, oldest first; None where there was none.

    Raises:
        RunError: The file cannot be read.
    """
    path = directory / FLIGHT_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    try:
        head, *rest = (json.loads(line) for line in lines)
        accident = Accident(head["reason"], head["step"], head["sentence"])
        readings = [Reading(line["step"], _as_values(line["values"]), loss=line["loss"]) for line in rest]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return accident, readings


def _as_values(values: Mapping[str, float | None]) -> dict[Tag, float]:
    parsed = ((parse_tag(tag), value) for tag, value in values.items())
    return {tag: value for tag, value in parsed if tag is not None and value is not None}


def grew_first(readings: Sequence[Reading], until: int, last: int = 6) -> list[Growth]:
    """Which tensors grew before an accident, the first in front.

    A tensor has grown since the first reading from which on its largest magnitude is always ten times the median of
    the older half of its readings.

    Args:
        readings: Oldest first.
        until: The step of the accident.
        last: Readings whose magnitudes are given.

    Returns:
        By the step since which they have grown, and in the order of execution within it.

    Example:
        >>> tag = Tag("activations", "abs_max", "fc")
        >>> sizes = [1.0, 1.1, 0.9, 1.0, 1.0, 20.0, 400.0]
        >>> (growth,) = grew_first([Reading(step, {tag: size}) for step, size in enumerate(sizes)], until=6)
        >>> growth.site.name, growth.step, growth.factor
        ('fc', 5, 400.0)
    """
    series: dict[Site, list[tuple[int, float]]] = {}
    for reading in readings:
        if reading.step <= until:
            for (kind, statistic, name), value in reading.values.items():
                if statistic == "abs_max":
                    series.setdefault(Site(kind, name), []).append((reading.step, value))
    grown = []
    for site, values in series.items():
        older = [value for _, value in values[: max(len(values) // 2, _BASELINE)]]
        limit = _GROWN * statistics.median(older)
        if len(values) <= _BASELINE or limit <= 0.0:
            continue
        since = None
        for step, value in reversed(values):
            if value <= limit:
                break
            since = step
        if since is not None:
            grown.append(Growth(site, since, values[-1][1] * _GROWN / limit, tuple(values[-last:])))
    return sorted(grown, key=lambda growth: growth.step)
