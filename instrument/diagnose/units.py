"""Units: which of them are dead, saturated or constant, judged over windows of samples and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from instrument.config import Config
from instrument.record.buffer import StepRecord
from instrument.record.documents import packed, unpacked

__all__ = ["UnitStatus", "UnitWindows", "decode", "encode"]


@dataclasses.dataclass(frozen=True)
class UnitStatus:
    """What is known of the units of one module."""

    name: str
    function: str | None
    units: int
    dead: tuple[int, ...]
    constant: tuple[int, ...]
    rare: tuple[int, ...]
    always_on: tuple[int, ...]
    saturated: tuple[float, ...]
    rate: tuple[float, ...]
    samples: int
    batches: int
    rate_bound: float
    verdict: str
    first_step: int
    last_step: int
    windows: int
    births: tuple[int, ...]
    deaths: tuple[int, ...]
    still_dead: float | None

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnitStatus:
        """Of what `as_dict` gave."""
        filled: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**filled)


class UnitWindows:
    """Collects the tallies of units."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def add(self, record: StepRecord) -> None:
        """Take the tallies of a step."""

    def status(self) -> dict[str, UnitStatus]:
        """What is known of each module."""
        return {}


def encode(statuses: Mapping[str, UnitStatus]) -> bytes:
    """Statuses as a document."""
    return packed({name: status.as_dict() for name, status in statuses.items()})


def decode(data: bytes) -> dict[str, UnitStatus]:
    """What `encode` was given."""
    return {name: UnitStatus.from_dict(values) for name, values in unpacked(data).items()}
