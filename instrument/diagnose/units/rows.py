"""The evidence of many gradients without a row of zeros, followed together.

Such a gradient tells that every unit behind it takes part, and no more: of all that are so on the same steps, a few
numbers stand for the evidence. One by one those of 400 layers took 4 ms a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from instrument.config import Config
from instrument.diagnose.units.status import UnitStatus
from instrument.diagnose.units.window import PARTS, Parts, Span, Window
from instrument.measure.units import living_rows, zero_rows

__all__ = ["RowWindow"]


class _RowSpan:
    """Some steps on each of which no row was zero."""

    __slots__ = ("batches", "first_step", "last_step", "samples")

    def __init__(self, step: int) -> None:
        self.first_step = self.last_step = step
        self.samples = self.batches = 0

    def add(self, step: int, samples: int) -> None:
        self.last_step = step
        self.samples += samples
        self.batches += 1

    def alone(self, rows: int) -> Span:
        """What they make of one gradient of so many rows."""
        one = living_rows(rows, self.samples)
        span = Span(self.first_step, dataclasses.replace(one, batches=self.batches, counted=self.batches))
        span.last_step = self.last_step
        return span


class RowWindow:
    """Windows of gradients that all had no row of zeros, on the same steps, of as many samples each.

    Before the first such step they are gradients that were zero in whole, which says nothing.

    Args:
        rows: Name of each parameter to the rows of its gradient.
        config: The settings.
    """

    def __init__(self, rows: Mapping[str, int], config: Config) -> None:
        self.rows = dict(rows)
        """Name of each parameter to the rows of its gradient."""
        self.is_judged = False
        """Whether the interval to which rates belong is over, so that the next step begins another."""
        self._config = config
        self._parts: Parts[_RowSpan] = Parts(config)
        self._interval: _RowSpan | None = None

    def add(self, step: int, samples: int) -> None:
        """Add a step on which none had a row of zeros."""
        if self._interval is None or self.is_judged:
            self._interval = _RowSpan(step)
        self.is_judged = False
        filling = self._parts.filling if self._parts.filling is not None else _RowSpan(step)
        for span in (self._interval, filling):
            span.add(step, samples)
        self._parts.fill(filling)

    def statuses(self) -> dict[str, UnitStatus]:
        """What is known of the units behind each gradient, by the name of the parameter; see `Window.status`."""
        alike = self._parts.status.but(witness="gradient rows")
        rates = {rows: (1.0,) * rows if alike.samples else () for rows in self.rows.values()}
        return {
            name: alike.but(name=name.rpartition(".")[0], units=rows, rate=rates[rows])
            for name, rows in self.rows.items()
        }

    def leave(self, names: Collection[str]) -> dict[str, Window]:
        """Follow some of the gradients one by one from now on; their windows."""
        return {name: self._alone(self.rows.pop(name)) for name in names}

    def _alone(self, rows: int) -> Window:
        """The window of one of the gradients; no unit behind it was ever dead."""
        window = Window(zero_rows(rows), self._config)
        window.parts = self._parts.each(lambda part: part.alone(rows))
        window.interval = self._interval.alone(rows) if self._interval is not None else None
        window.is_judged = self.is_judged
        if self._parts.completed >= PARTS:
            window.dead = np.zeros(rows, np.bool_)
        return window
