"""The evidence of one module's units: a window of samples in parts, and what the last whole windows found.

Windows are kept in quarters: four that are full and one that fills. The evidence is always all of them: from a window
to one and a quarter, and never empty. Halves reach back further: a training of 800 steps in batches of 64, of which
every tenth is sampled, then ends with evidence from its first step, and of the dead units 1 % are found instead of
94 %. Windows that do not overlap, of four quarters each, are compared with one another: units that came alive, that
died, and the share of the dead that are dead still (Sokar et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from instrument.config import Config
from instrument.diagnose.units.status import Indices, UnitStatus
from instrument.measure.histogram import FloatArray
from instrument.measure.units import BoolArray, UnitTally, merge_tallies

__all__ = ["CONSTANT_RANGE", "PARTS", "RARE_RATE", "Parts", "Span", "Window", "is_constant"]

CONSTANT_RANGE = 1e-6
"""Range of a constant unit, of the root mean square of its layer: a few units in the last place of float32."""

PARTS = 4
"""Parts of a window; one that is full pushes out the oldest."""

RARE_RATE = 0.01
"""Share of samples on which a rare unit is not flat, at most."""


class Span:
    """What the tallies of some steps make together; arrays are made anew, so that what was given out stays."""

    __slots__ = (
        "_again", "_counted", "_dead", "_flat", "_high", "_last", "_low", "_never", "_squares", "batches", "first_step",
        "last_step", "samples",
    )  # fmt: skip

    def __init__(self, step: int, tally: UnitTally) -> None:
        self.first_step = self.last_step = step
        self.samples = tally.samples
        self.batches = tally.batches
        self._counted = tally.counted
        self._squares = tally.square_mean * tally.samples
        self._low, self._high, self._flat = tally.low, tally.high, tally.flat
        self._dead, self._never = tally.dead_flat, tally.never_flat
        self._last = tally
        self._again = 0

    def add(self, step: int, tally: UnitTally) -> None:
        """Add the tally of a later step, of the same units."""
        self.last_step = step
        self.samples += tally.samples
        self.batches += tally.batches
        if tally is self._last:  # most gradients have no row of zeros, and share one tally
            self._again += 1
            return
        self._count_again()
        self._counted += tally.counted
        self._squares += tally.square_mean * tally.samples
        self._low, self._high = np.minimum(self._low, tally.low), np.maximum(self._high, tally.high)
        if tally.counted:
            self._flat = self._flat + tally.flat
        # Tallies that tell of the range alone share their flags.
        if tally.dead_flat is not self._dead:
            self._dead = self._dead & tally.dead_flat
        if tally.never_flat is not self._never:
            self._never = self._never & tally.never_flat
        self._last = tally

    @property
    def tally(self) -> UnitTally:
        """All of them merged; see `merge_tallies`."""
        self._count_again()
        last = self._last
        square_mean = self._squares / self.samples if self.samples else 0.0
        return UnitTally(
            last.function, self.samples, self.batches, self._low, self._high, self._counted, self._flat, self._dead,
            self._never, square_mean, last.witness,
        )  # fmt: skip

    def _count_again(self) -> None:
        """Have the last tally stand for all the times that it came."""
        if self._again:
            last = self._last
            self._counted += self._again * last.counted
            self._squares += self._again * last.square_mean * last.samples
            self._flat = self._flat + self._again * last.flat
            self._again = 0


class _Steps(Protocol):
    """Some steps."""

    first_step: int
    last_step: int
    samples: int
    batches: int


_S = TypeVar("_S", bound=_Steps)
_Other = TypeVar("_Other", bound=_Steps)


class Parts(Generic[_S]):
    """The evidence of one window and up to a quarter more, in quarters.

    Args:
        config: The settings: how many samples and batches make a window.
    """

    __slots__ = ("_config", "completed", "filling", "full")

    def __init__(self, config: Config) -> None:
        self._config = config
        self.full: list[_S] = []
        """The last full parts, `PARTS` at most."""
        self.filling: _S | None = None
        """The part that fills."""
        self.completed = 0
        """How many parts have become full so far."""

    def fill(self, steps: _S) -> bool:
        """Have the part that fills hold these steps from now on; returns whether it is full by that."""
        self.filling = steps
        if not self._has_share(PARTS * steps.samples, PARTS * steps.batches):
            return False
        self.full = [*self.full[1 - PARTS :], steps]
        self.filling = None
        self.completed += 1
        return True

    @property
    def all(self) -> list[_S]:
        """All parts, the one that fills included."""
        return [*self.full, self.filling] if self.filling is not None else self.full

    @property
    def is_window(self) -> bool:
        """Whether a whole window has been seen."""
        return self._has_share(sum(part.samples for part in self.all), sum(part.batches for part in self.all))

    @property
    def status(self) -> UnitStatus:
        """What the evidence tells by its size alone, of a module without a name: of units that nothing is said of."""
        evidence = self.all
        if not evidence:
            return UnitStatus("")
        samples = sum(part.samples for part in evidence)
        return UnitStatus(
            "",
            samples=samples,
            batches=sum(part.batches for part in evidence),
            rate_bound=min(1.0, 3 / samples),
            verdict="ok" if self.is_window else "watching",
            first_step=evidence[0].first_step,
            last_step=evidence[-1].last_step,
        )

    def _has_share(self, samples: int, batches: int) -> bool:
        return samples >= self._config.dead_window_samples and batches >= self._config.dead_window_batches

    def each(self, change: Callable[[_S], _Other]) -> Parts[_Other]:
        """The same with something else for each part."""
        changed: Parts[_Other] = Parts(self._config)
        changed.full = [change(part) for part in self.full]
        changed.filling = change(self.filling) if self.filling is not None else None
        changed.completed = self.completed
        return changed


class Window:
    """The evidence of one module or gradient, in parts, and what the last whole windows found."""

    def __init__(self, tally: UnitTally, config: Config) -> None:
        self.parts: Parts[Span] = Parts(config)
        """The evidence."""
        self.interval: Span | None = None
        """Steps since the units were judged last, to which rates belong."""
        self.is_judged = False
        """Whether the interval is over, so that the next step begins another."""
        self.pattern = tally
        self.dead_windows = 0
        self.saturated_windows = 0
        self.dead: BoolArray | None = None
        self.births: Indices = ()
        self.deaths: Indices = ()
        self.still_dead: float | None = None
        self._config = config

    def add(self, step: int, tally: UnitTally) -> None:
        """Add what was seen in one step."""
        self.interval = _joined(None if self.is_judged else self.interval, step, tally)
        self.is_judged = False
        if self.parts.fill(_joined(self.parts.filling, step, tally)) and self.parts.completed % PARTS == 0:
            self._compare(merge_tallies(part.tally for part in self.parts.full))

    def _compare(self, window: UnitTally) -> None:
        """A window is whole: hold what is dead in it against the one before."""
        dead, before = window.dead_flat, self.dead
        self.dead_windows = self.dead_windows + 1 if dead.any() else 0
        is_saturated = self._is_saturated(window)
        self.saturated_windows = self.saturated_windows + 1 if is_saturated else 0
        if before is not None:
            self.births, self.deaths = _indices(before & ~dead), _indices(dead & ~before)
            self.still_dead = _rounded(np.mean(dead[before])) if before.any() else None
        self.dead = dead

    def _is_saturated(self, window: UnitTally) -> bool:
        if window.function is None or not window.counted:
            return False
        return float(np.mean(window.flat)) > self._config.saturated_fraction_crit * window.counted

    def status(self, name: str) -> UnitStatus:
        """What is known of the units."""
        evidence = self.parts.all
        if not evidence:
            return UnitStatus(name, self.pattern.function, self.pattern.units, witness=self.pattern.witness)
        tally = merge_tallies(span.tally for span in evidence)
        status = self.parts.status.but(
            name=name,
            function=tally.function,
            units=tally.units,
            saturated=_shares(tally.flat, tally.counted) if tally.function is not None else (),
            rate=_rates(self.interval.tally) if self.interval is not None else (),
            windows=self.dead_windows,
            saturated_windows=self.saturated_windows,
            births=self.births,
            deaths=self.deaths,
            still_dead=self.still_dead,
            witness=tally.witness,
        )
        if not self.parts.is_window:
            return status
        dead = _indices(tally.dead_flat)
        return status.but(
            dead=dead,
            constant=_indices(is_constant(tally.low, tally.high, tally.square_mean)),
            rare=_indices(_is_rare(tally)),
            always_on=_indices(tally.never_flat),
            verdict="dead" if dead else "ok",
        )


def _joined(span: Span | None, step: int, tally: UnitTally) -> Span:
    """A span with one more tally, or a new one."""
    if span is None:
        return Span(step, tally)
    span.add(step, tally)
    return span


def is_constant(low: FloatArray, high: FloatArray, square_mean: float | FloatArray) -> BoolArray:
    """Whether the range of each unit is about zero, beside the scale of its layer."""
    with np.errstate(invalid="ignore"):  # infinite where nothing is known of the range
        found: BoolArray = (high - low <= CONSTANT_RANGE * np.sqrt(square_mean)) & np.isfinite(square_mean)
    return found


def _is_rare(tally: UnitTally) -> BoolArray:
    """Whether each unit fires, and yet on a share of the samples below `RARE_RATE`; rows know no samples."""
    if tally.function is None or not tally.counted:
        return np.zeros(tally.units, np.bool_)
    return ~tally.dead_flat & (tally.counted - tally.flat < RARE_RATE * tally.counted)


def _rates(tally: UnitTally) -> tuple[float, ...]:
    return _shares(tally.counted - tally.flat, tally.counted)


def _shares(counts: np.ndarray[Any, Any], of: int) -> tuple[float, ...]:
    """Shares with four digits, as event files have them."""
    return tuple(np.round(counts / of, 4).tolist()) if of else ()


def _rounded(share: float | np.floating[Any]) -> float:
    return round(float(share), 4)


def _indices(mask: BoolArray) -> Indices:
    return tuple(np.flatnonzero(mask).tolist())
