"""`UnitTally`: what the units of one module did, in a form that merges exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.device import DeviceColumns, Marked
from instrument.measure.histogram import FloatArray, IntArray

__all__ = ["BoolArray", "DeviceTally", "UnitTally", "Witness", "merge_tallies"]

BoolArray: TypeAlias = "npt.NDArray[np.bool_]"
Witness: TypeAlias = Literal["activations", "gradient rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class UnitTally:
    """What one module's units did on some samples; tallies of the same units merge exactly.

    Example:
        >>> from instrument.measure.slopes import slopes_named
        >>> from instrument.measure.units import tally_units
        >>> z = torch.tensor([[-1.0, 2.0], [-3.0, -4.0]])
        >>> tally = tally_units(z, 1, slopes_named("relu"))
        >>> tally.samples, tally.dead_flat.tolist(), tally.flat.tolist()
        (2, [True, False], [2, 1])
    """

    function: str | None
    """Name of the nonlinearity whose slope is judged; None where only the range is known."""

    samples: int
    """Samples seen: rows, tokens or images."""

    batches: int
    """Calls of the module, or micro-batches, seen."""

    low: FloatArray
    """Smallest value of each unit, of shape (units,): of z for a nonlinearity, else of what the module returned; +inf
    where there is no sample, -inf where nothing is known of it, NaN where a value was NaN."""

    high: FloatArray
    """Largest value of each unit, of shape (units,); -inf, +inf and NaN likewise."""

    counted: int
    """Samples whose flatness was counted, a strided subset; for gradient rows, steps."""

    flat: IntArray
    """Counted samples on which each unit was flat at `FLAT_SLOPE`, of shape (units,)."""

    dead_flat: BoolArray
    """Whether each unit was flat at `DEAD_SLOPE` on every sample, counted or not; False where that is not known."""

    never_flat: BoolArray
    """Whether each unit of a piecewise linear function was flat on no sample at all; False for other functions."""

    square_mean: float
    """Mean square of the values of a strided sample: the scale against which a range is about zero."""

    witness: Witness = "activations"
    """What tells: the activations, or rows of the weight's gradient that were exactly zero. Those are the same evidence
    behind a ReLU, and need no forward hook."""

    @property
    def units(self) -> int:
        """Number of units."""
        return self.low.size

    @classmethod
    def empty(cls, units: int, function: str | None = None, witness: Witness = "activations") -> UnitTally:
        """The tally of no sample at all, neutral under `merge`."""
        low = np.full(units, math.inf)
        always = np.ones(units, np.bool_)
        return cls(function, 0, 0, low, -low, 0, np.zeros(units, np.int64), always, always, 0.0, witness)

    def fits(self, other: UnitTally) -> bool:
        """Whether another tally is of the same units, judged the same way, so that both can be merged."""
        return (self.units, self.function, self.witness) == (other.units, other.function, other.witness)

    def merge(self, *others: UnitTally) -> UnitTally:
        """The tally of all samples of this tally and of others that it `fits`.

        Args:
            others: Any number of tallies.

        Returns:
            A new tally: extremes of the ranges, sums of the counts, and flat on every sample of all of them.

        Example:
            >>> from instrument.measure.units import tally_units
            >>> UnitTally.empty(3).merge(tally_units(torch.ones(5, 3), 1, None)).samples
            5
        """
        return merge_tallies((self, *others))

    def to_arrays(self) -> tuple[FloatArray, FloatArray]:
        """What ranks merge; a rank that lacks this tally gives that of `empty`.

        Returns:
            What is merged by its maximum (lows with their sign turned, highs, and as 0.0 or 1.0 where NaN was and where
            the two flags do not hold: float64 of shape (5 * units,)), and what is summed (flat counts, then samples,
            batches, counted and the sum of squares: float64 of shape (units + 4,), exact below 2**53). NaN is a flag
            of its own because what a collective makes of its maximum is not defined.

        Example:
            >>> tally = UnitTally.empty(3).merge()
            >>> UnitTally.from_arrays(*tally.to_arrays(), tally.function).units
            3
        """
        is_nan = np.isnan(self.low) | np.isnan(self.high)
        low, high = np.where(is_nan, math.inf, self.low), np.where(is_nan, -math.inf, self.high)
        flags = (is_nan, ~self.dead_flat, ~self.never_flat)
        sums = (self.samples, self.batches, self.counted, self.square_mean * self.samples)
        return np.concatenate((-low, high, *flags), dtype=np.float64), np.append(self.flat, sums).astype(np.float64)

    @classmethod
    def from_arrays(
        cls, maxima: FloatArray, sums: FloatArray, function: str | None, witness: Witness = "activations"
    ) -> UnitTally:
        """The tally of what `to_arrays` gave, merged over ranks."""
        low, high, is_nan, is_not_dead, is_ever_flat = np.split(maxima, 5)
        samples, batches, counted = (int(number) for number in sums[-4:-1])
        return cls(
            function,
            samples,
            batches,
            np.where(is_nan > 0, math.nan, -low),
            np.where(is_nan > 0, math.nan, high),
            counted,
            sums[:-4].astype(np.int64),
            is_not_dead <= 0,
            is_ever_flat <= 0,
            float(sums[-1]) / samples if samples else 0.0,
            witness,
        )


class DeviceTally:
    """A tally that lies on a device; whoever asks for it first waits for the device.

    Args:
        numbers: What was computed, on the device, or what travels to the host with other things.
        samples: How many samples it is of.
        make: Makes the tally of `numbers` as an array.
    """

    __slots__ = ("_make", "_numbers", "samples")

    def __init__(self, numbers: torch.Tensor | DeviceColumns, samples: int, make: Callable[[Any], UnitTally]) -> None:
        self.samples = samples
        """How many samples it is of, known already."""
        self._numbers = Marked(numbers) if isinstance(numbers, torch.Tensor) else numbers
        self._make = make

    def fetch(self) -> UnitTally:
        """The tally; waits until its numbers are on the host."""
        return self._make(np.asarray(self._numbers.fetch()))


class _Pending(Protocol):
    """What will give a tally."""

    def fetch(self) -> UnitTally:
        """The tally; whoever asks makes it, or waits for it."""


def merge_tallies(tallies: Iterable[UnitTally | _Pending]) -> UnitTally:
    """Merge one or more tallies; those that do not fit the last, because their module was changed, are left out.

    Args:
        tallies: At least one; what is not there yet is fetched.

    Returns:
        One tally; see `UnitTally.merge`.
    """
    found = [tally if isinstance(tally, UnitTally) else tally.fetch() for tally in tallies]
    last = found[-1]
    if len(found) == 1:
        return last
    units, function, witness = last.low.size, last.function, last.witness
    found = [t for t in found if t.low.size == units and t.function == function and t.witness == witness]
    samples = sum(tally.samples for tally in found)
    counted = sum(tally.counted for tally in found)
    squares = sum(tally.square_mean * tally.samples for tally in found if tally.samples)
    return UnitTally(
        function,
        samples,
        sum(tally.batches for tally in found),
        np.minimum.reduce([tally.low for tally in found]),
        np.maximum.reduce([tally.high for tally in found]),
        counted,
        np.add.reduce([tally.flat for tally in found]) if counted else last.flat,
        _on_all([tally.dead_flat for tally in found]),
        _on_all([tally.never_flat for tally in found]),
        squares / samples if samples else 0.0,
        witness,
    )


def _on_all(flags: list[BoolArray]) -> BoolArray:
    """What holds on all of several; tallies of which the range alone is known share their flags."""
    first = flags[0]
    if all(flag is first for flag in flags):
        return first
    both: BoolArray = np.logical_and.reduce(flags)
    return both
