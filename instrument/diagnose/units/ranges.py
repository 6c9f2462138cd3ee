"""The evidence of many modules of which the range alone is known, followed together.

So it is with the output of a layer behind which no nonlinearity was seen. Hundreds of small ones that are measured
together stay together: one by one their ranges took 7 ms a step for 400 layers, joined as one array 0.2.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from instrument.config import Config
from instrument.diagnose.units.status import UnitStatus
from instrument.diagnose.units.window import Parts, Span, Window, is_constant
from instrument.measure.units import Ranges, tally_of_range

__all__ = ["RangeWindow"]


class _RangeSpan:
    """What the ranges of some steps make together."""

    __slots__ = ("_high", "_last", "_low", "_squares", "batches", "first_step", "last_step", "samples")

    def __init__(self, step: int, ranges: Ranges) -> None:
        self.first_step = self.last_step = step
        self.batches = 1
        self.samples = int(ranges.samples[0])
        self._squares = ranges.square_mean * self.samples
        self._low, self._high = ranges.low, ranges.high
        self._last = ranges

    def add(self, step: int, ranges: Ranges) -> None:
        """Add the ranges of a later step, of the same units."""
        samples = int(ranges.samples[0])
        self.last_step = step
        self.batches += 1
        self.samples += samples
        self._squares = self._squares + ranges.square_mean * samples
        self._low, self._high = np.minimum(self._low, ranges.low), np.maximum(self._high, ranges.high)
        self._last = ranges

    @property
    def ranges(self) -> Ranges:
        """All of them merged."""
        return self._last._replace(
            samples=np.full_like(self._last.samples, self.samples),
            low=self._low,
            high=self._high,
            square_mean=self._squares / self.samples,
        )

    def alone(self, row: int) -> Span:
        """What they make of one module."""
        extent = self.ranges.at(row)
        span = Span(self.first_step, tally_of_range(extent, self.batches))
        span.last_step = self.last_step
        return span


class RangeWindow:
    """Windows of modules that were measured together on every step so far, on as many samples each.

    Args:
        names: Their names.
        ranges: Those of the first step.
        config: The settings.
    """

    def __init__(self, names: tuple[str, ...], ranges: Ranges, config: Config) -> None:
        self.names = names
        """The names of the modules."""
        self._pattern = ranges
        self._config = config
        self._parts: Parts[_RangeSpan] = Parts(config)

    def fits(self, names: tuple[str, ...], ranges: Ranges) -> bool:
        """Whether ranges are of the same units of the same modules."""
        return names == self.names and np.array_equal(ranges.units, self._pattern.units)

    def add(self, step: int, ranges: Ranges) -> None:
        """Add what was seen in one step."""
        filling = self._parts.filling
        if filling is None:
            filling = _RangeSpan(step, ranges)
        else:
            filling.add(step, ranges)
        self._parts.fill(filling)

    def statuses(self) -> dict[str, UnitStatus]:
        """What is known of the units of each module; see `Window.status`."""
        alike = self._parts.status
        spans = [span.ranges for span in self._parts.all]
        squares = sum(span.square_mean * span.samples for span in spans) / alike.samples
        constant = np.zeros(spans[0].low.size, np.bool_)
        if self._parts.is_window:
            low, high = (np.minimum.reduce([s.low for s in spans]), np.maximum.reduce([s.high for s in spans]))
            constant = is_constant(low, high, np.repeat(squares, self._pattern.units))
        found = {
            name: alike.but(name=name, units=units)
            for name, units in zip(self.names, self._pattern.units.tolist(), strict=True)
        }
        if constant.any():
            ends = np.cumsum(self._pattern.units).tolist()
            for (name, status), end in zip(found.items(), ends, strict=True):
                own = np.flatnonzero(constant[end - status.units : end])
                found[name] = status.but(constant=tuple(own.tolist()))
        return found

    def leave(self, names: Collection[str]) -> dict[str, Window]:
        """Follow modules one by one from now on: all of them, whichever leave; their windows."""
        return {name: self._alone(row) for row, name in enumerate(self.names)}

    def _alone(self, row: int) -> Window:
        """The window of one of the modules; of a range no unit is ever dead, so that whole windows found nothing."""
        window = Window(tally_of_range(self._pattern.at(row)), self._config)
        window.parts = self._parts.each(lambda part: part.alone(row))
        return window
