"""`UnitStatus`: what is known of the units of one module, and how that stands in an event file."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from instrument.errors import RunError
from instrument.measure.units import Witness

__all__ = ["Indices", "UnitStatus", "Verdict", "decode", "encode"]

Verdict: TypeAlias = Literal["no-data", "watching", "ok", "dead"]
Indices: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UnitStatus:
    """What is known of the units of one module.

    Lists of units are empty until a whole window has been seen.

    Example:
        >>> status = UnitStatus("act", "relu", units=2, samples=4096, verdict="dead", dead=(1,))
        >>> UnitStatus.from_dict(status.as_dict()) == status
        True
    """

    name: str
    """Name of the module."""

    function: str | None = None
    """The nonlinearity whose slope was judged; None where only the range of the output is known, or gradient rows."""

    units: int = 0
    """Number of units; 0 where the module was never seen."""

    dead: Indices = ()
    """Units that were flat (slope below 0.01) on every sample of the evidence; gradient rows that were always zero."""

    constant: Indices = ()
    """Units whose range over the evidence is about zero."""

    rare: Indices = ()
    """Units that are not dead, and not flat on less than 1 % of the samples."""

    always_on: Indices = ()
    """Units of a piecewise linear function that never were flat, and so are linear; no fault."""

    saturated: tuple[float, ...] = ()
    """Share of the counted samples on which each unit was flat (slope below 0.05): for a ReLU, how sparse it is. Empty
    where no slope was judged."""

    rate: tuple[float, ...] = ()
    """Share of the counted samples of the last interval on which each unit was not flat; of its steps, for gradient
    rows. Empty where neither was judged."""

    samples: int = 0
    """Samples of the evidence: rows, tokens or images; for gradient rows a number that is certainly not too large."""

    batches: int = 0
    """Batches of the evidence."""

    rate_bound: float = 1.0
    """Share of samples that a unit which was silent on all of the evidence fires on, at most, with 95 % confidence."""

    verdict: Verdict = "no-data"
    """"no-data": no sample was seen; "watching": less than a window; "dead": some unit is; "ok": none."""

    first_step: int | None = None
    """First step of the evidence."""

    last_step: int | None = None
    """Last step of the evidence."""

    windows: int = 0
    """Windows in a row, none overlapping another, of which each found a dead unit."""

    saturated_windows: int = 0
    """Windows in a row, none overlapping another, in each of which the mean of `saturated` was above
    `saturated_fraction_crit`."""

    births: Indices = ()
    """Units that were dead in the window before the last and were not in the last one."""

    deaths: Indices = ()
    """Units that were dead in the last window and were not in the one before it."""

    still_dead: float | None = None
    """Share of the dead units of the window before the last that were dead in the last one too; None without any."""

    witness: Witness = "activations"
    """What tells: the activations, or rows of the weight's gradient that were exactly zero."""

    def but(self, **changes: Any) -> UnitStatus:
        """The same with other values of some fields.

        Example:
            >>> UnitStatus("act", units=2).but(dead=(1,)).dead
            (1,)
        """
        found = object.__new__(UnitStatus)  # a frozen dataclass sets its fields by one slow call each
        found.__dict__.update(self.__dict__, **changes)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: lists for tuples.

        Example:
            >>> UnitStatus("act", dead=(3,)).as_dict()["dead"]
            [3]
        """
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnitStatus:
        """The status that `as_dict` was made of; keys that are not known are passed over.

        Args:
            values: As `as_dict` gives them, from this version or another.

        Returns:
            The status.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        found.update((name, tuple(value)) for name, value in found.items() if isinstance(value, list))
        return cls(**found)


_SILENT = {field.name: field.default for field in dataclasses.fields(UnitStatus)}
"""What each field is where it says nothing; only the name never is."""


def encode(statuses: Mapping[str, UnitStatus]) -> bytes:
    """Statuses as they stand in an event file: JSON, compressed.

    Args:
        statuses: Module name to status.

    Returns:
        What `decode` reads.

    Example:
        >>> decode(encode({"act": UnitStatus("act", "relu")}))["act"].function
        'relu'
    """
    # Fields that say nothing are left out: of hundreds of modules they are most of the text, and of the time it takes.
    every = {name: {k: v for k, v in vars(status).items() if v != _SILENT[k]} for name, status in statuses.items()}
    text = json.dumps(every, separators=(",", ":"))
    return zlib.compress(text.encode())


def decode(data: bytes) -> dict[str, UnitStatus]:
    """Statuses out of an event file.

    Args:
        data: What `encode` gave.

    Returns:
        Module name to status.

    Raises:
        RunError: The data are something else.
    """
    try:
        values = json.loads(zlib.decompress(data))
        return {name: UnitStatus.from_dict(value) for name, value in values.items()}
    except (zlib.error, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"statuses of units cannot be read: {type(error).__name__}: {error}") from error
