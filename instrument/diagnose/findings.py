"""Findings: what a diagnostic has to say, in numbers for programs and in one sentence for people."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator
from typing import Any

from instrument.capture.names import MODULE_KINDS, Site

__all__ = ["UNDATED", "Finding", "Level", "Standing"]


class Level(enum.IntEnum):
    """How much a finding matters; compares by severity.

    Example:
        >>> str(Level.CRIT), Level.WARN > Level.INFO
        ('CRIT', True)
    """

    INFO = 10
    """Worth knowing; nothing need be wrong."""
    WARN = 20
    """Probably wrong; look at it."""
    CRIT = 30
    """The training fails, or a part of the network takes no part in it."""

    def __str__(self) -> str:
        return self.name


UNDATED = -1
"""Stands where the step of a finding stands, before it has one."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One diagnosis: what was found where, since when, and what to try.

    Example:
        >>> found = Finding(
        ...     Level.WARN, "dead_units", Site("activations", "blocks.0.act"), 400, 0.25, 0.1, "of units",
        ...     "a quarter of the units is dead"
        ... )
        >>> print(found)
        WARN step 400, layer blocks.0.act: a quarter of the units is dead
    """

    level: Level
    diagnostic: str
    """Name of the diagnostic that found it."""
    site: Site | None
    """Kind and name; None for the network as a whole."""
    step: int
    """The step on which it was found."""
    value: float
    """What was measured."""
    threshold: float
    """What it was compared with."""
    unit: str
    """What both are in, such as "of units" or "log10"."""
    sentence: str
    """What it means and what to try, for somebody who has never heard of it."""

    def on(self, step: int) -> Finding:
        """The same, found on another step."""
        found = object.__new__(Finding)  # a frozen dataclass sets its fields by one slow call each
        found.__dict__.update(self.__dict__, step=step)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The same for programs; numbers that JSON does not know are None."""
        return {
            "level": str(self.level),
            "diagnostic": self.diagnostic,
            "kind": self.site.kind if self.site is not None else None,
            "name": self.site.name if self.site is not None else None,
            "step": self.step,
            "value": self.value if math.isfinite(self.value) else None,
            "threshold": self.threshold,
            "unit": self.unit,
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        where = ""
        if self.site is not None:
            where = f", layer {self.site.name}" if self.site.kind in MODULE_KINDS else f", {self.site.name}"
        return f"{self.level} step {self.step}{where}: {self.sentence}"


class Standing(Iterable[Finding]):
    """Findings that come again on every step as long as nothing changes; where gradients vanish there are hundreds.

    Args:
        undated: What is found, of step `UNDATED`; the same tuple as long as the same is found.
        step: The step on which it is.

    Example:
        >>> undated = (Finding(Level.WARN, "no_gradient", None, UNDATED, 0.0, 0.0, "gradient", "nothing learns"),)
        >>> [found.step for found in Standing(undated, 7)]
        [7]
    """

    def __init__(self, undated: tuple[Finding, ...], step: int) -> None:
        self.undated = undated
        """The findings, without their step."""
        self.step = step
        """The step on which they were found."""

    def __iter__(self) -> Iterator[Finding]:
        return (finding.on(self.step) for finding in self.undated)
