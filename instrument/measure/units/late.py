"""Tallies of small tensors that are measured together, worked out with their sketches by whoever measures them.

By itself the tally of a few hundred values took 30 us of the training thread, and the rows of a small gradient 12. As
the values have been copied anyway, that thread notes what is wanted, and one call finds the ranges of all. Where a
range is all that is wanted, or rows are all alike, those of many tensors stay side by side: a tally for each, and what
follows them one by one, took 12 us.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from instrument.measure import native
from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.slopes import Slopes
from instrument.measure.units.reduce import (
    Extent,
    living_rows,
    tally_of_range,
    tally_plain,
    tally_rows,
    zero_rows,
)
from instrument.measure.units.shape import scale_steps, sides
from instrument.measure.units.tally import UnitTally

__all__ = ["LateTallies", "LateTally", "Ranges", "Rows"]


class Ranges(NamedTuple):
    """Ranges of the units of several tensors, one tensor behind the other."""

    samples: IntArray
    """How many samples each tensor has, of shape (tensors,)."""

    units: IntArray
    """How many units each has, of shape (tensors,)."""

    low: FloatArray
    """Smallest value of each unit of each tensor, of shape (sum of units,); NaN where a value was NaN."""

    high: FloatArray
    """Largest value, likewise."""

    square_mean: FloatArray
    """Mean square of a strided sample of each tensor, of shape (tensors,)."""

    def at(self, row: int) -> Extent:
        """The range of one tensor."""
        end = int(self.units[: row + 1].sum())
        part = slice(end - int(self.units[row]), end)
        return Extent(int(self.samples[row]), self.low[part], self.high[part], float(self.square_mean[row]))

    def take(self, rows: IntArray) -> Ranges:
        """Those of some tensors, given in their order."""
        if rows.size == self.samples.size:
            return self
        is_taken = np.zeros(self.samples.size, np.bool_)
        is_taken[rows] = True
        units = np.repeat(is_taken, self.units)
        return Ranges(self.samples[rows], self.units[rows], self.low[units], self.high[units], self.square_mean[rows])

    @classmethod
    def joined(cls, parts: Sequence[Ranges]) -> Ranges:
        """Those of one group behind those of another."""
        return cls(*map(np.concatenate, zip(*parts, strict=True))) if len(parts) > 1 else parts[0]


class Rows(NamedTuple):
    """Gradients of which either no row or every row is zero, one behind the other."""

    units: IntArray
    """How many rows each has, of shape (gradients,)."""

    samples: IntArray
    """How many samples each is of, of shape (gradients,); 0 for one that is zero in whole, which says nothing."""

    def take(self, rows: IntArray) -> Rows:
        """Those of some gradients."""
        return Rows(self.units[rows], self.samples[rows])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Those of one group behind those of another."""
        return cls(*map(np.concatenate, zip(*parts, strict=True))) if len(parts) > 1 else parts[0]


_NONE: IntArray = np.empty(0, np.int64)
_NO_RANGES = Ranges(_NONE, _NONE, *(np.empty(0),) * 3)
_NO_ROWS = Rows(_NONE, _NONE)


class _Source(Protocol):
    """Who makes tallies when one is asked for."""

    def made(self, number: int) -> UnitTally:
        """The tally of this number."""

    def samples_of(self, number: int) -> int:
        """How many samples that is of."""


class LateTally:
    """The tally of a tensor that waits for others to be measured with.

    Args:
        source: Who makes it.
        number: Its number there.
    """

    __slots__ = ("_number", "_source")

    def __init__(self, source: _Source, number: int) -> None:
        self._source = source
        self._number = number

    @property
    def samples(self) -> int:
        """How many samples it is of, known already."""
        return self._source.samples_of(self._number)

    def fetch(self) -> UnitTally:
        """The tally; what waits is measured now unless that is done."""
        return self._source.made(self._number)


class LateTallies:
    """What is wanted of the tensors of a group, and what was found.

    It stands in flat lists of numbers, since an object for each would keep the garbage collector busy.
    """

    __slots__ = (
        "_found", "_gradients", "_kinds", "_outputs", "_range_at", "_ranges", "_row_at", "_rows", "_slopes", "samples",
    )  # fmt: skip

    def __init__(self) -> None:
        self.samples: list[int] = []
        """Of each tally how many samples it is of."""
        # Each is one list, and is added to by one operation: Ctrl-C in the middle leaves no entry that is half there.
        self._outputs: list[int] = []
        """Of each tally of units three entries: its number, the place of its tensor, and the kind of that."""
        self._kinds: dict[tuple[tuple[int, ...], int], int] = {}
        """Shape and dimension of the units of each kind; most tensors of a group are of a few."""
        self._slopes: dict[int, Slopes] = {}
        self._gradients: list[int] = []
        """Of each tally of rows four: number, place of the tensor, how many rows that has, and of how many values."""
        self._found: dict[int, UnitTally | Exception] = {}
        self._ranges = _NO_RANGES
        self._rows = _NO_ROWS
        # Where the tally of each number stands among those; -1 where it does not.
        self._range_at = self._row_at = _NONE

    def add(self, index: int, shape: tuple[int, ...], axis: int, slopes: Slopes | None) -> int:
        """Want the tally of the units of a tensor; see `instrument.measure.units.tally_units`.

        Args:
            index: Its place in the group.
            shape: Its shape.
            axis: Dimension of the units.
            slopes: Where the nonlinearity is flat, if one is judged.

        Returns:
            The number of the tally.
        """
        number = len(self.samples)
        self.samples.append(_cube(shape, axis)[0][0])
        if slopes is not None:
            self._slopes[number] = slopes
        self._outputs += (number, index, self._kinds.setdefault((shape, axis), len(self._kinds)))
        return number

    def add_rows(
        self, places: Sequence[int], rows: Sequence[int], widths: Sequence[int], samples: Sequence[int]
    ) -> int:
        """Want tallies of the rows of gradients that are zero; see `instrument.measure.units.tally_rows`.

        Args:
            places: Their places in the group.
            rows: How many rows each has,
            widths: of how many values.
            samples: How many samples each is of.

        Returns:
            The number of the first tally, behind which the others follow.
        """
        first = len(self.samples)
        self.samples += samples
        numbers = range(first, first + len(places))
        self._gradients += [*itertools.chain.from_iterable(zip(numbers, places, rows, widths, strict=True))]
        return first

    def found(self, number: int) -> UnitTally | Exception | None:
        """The tally of this number, or what went wrong; None where it was not made."""
        if number < self._range_at.size:
            if (place := self._range_at[number]) >= 0:
                return tally_of_range(self._ranges.at(place))
            if (place := self._row_at[number]) >= 0:
                rows, samples = int(self._rows.units[place]), int(self._rows.samples[place])
                return living_rows(rows, samples) if samples else zero_rows(rows)
        return self._found.get(number)

    def together(self, numbers: IntArray) -> tuple[tuple[IntArray, Ranges], tuple[IntArray, Rows]]:
        """Of which of some tallies ranges, or uniform rows, are all there is; see `Group.together`."""
        if not self._range_at.size:
            return (_NONE, _NO_RANGES), (_NONE, _NO_ROWS)
        ranges, rows = self._range_at[numbers], self._row_at[numbers]
        range_places, row_places = np.flatnonzero(ranges >= 0), np.flatnonzero(rows >= 0)
        taken = self._ranges.take(ranges[range_places])
        return (range_places, taken), (row_places, self._rows.take(rows[row_places]))

    def make(self, flat: torch.Tensor, starts: IntArray) -> None:
        """Work out all that is wanted; call it under `Unseen`.

        Args:
            flat: The values of the group, of shape (n,).
            starts: Where those of each tensor begin.
        """
        if not self.samples:
            return
        numbers, indices, kinds = np.array(self._outputs, np.int64).reshape(-1, 3).T
        shapes = list(self._kinds)
        range_at, row_at = np.full((2, len(self.samples)), -1)
        is_native = native.can_measure(flat)
        extents: dict[int, Extent] = {}
        by_itself = list(range(numbers.size))
        if is_native and numbers.size:
            sizes, steps = (np.array(found) for found in zip(*(_cube(*kind) for kind in shapes), strict=True))
            cubes = sizes[kinds]
            found = native.ranges_of_many(flat, starts[indices], cubes, steps[kinds])
            ranges = Ranges(cubes[:, 0], cubes[:, 1], *found)
            judged = (
                [row for row, number in enumerate(numbers.tolist()) if number in self._slopes] if self._slopes else []
            )
            alone = np.delete(np.arange(numbers.size), judged)
            self._ranges = ranges.take(alone)
            range_at[numbers[alone]] = np.arange(alone.size)
            extents, by_itself = {row: ranges.at(row) for row in judged}, judged
        for row in by_itself:
            number, (shape, axis) = int(numbers[row]), shapes[kinds[row]]
            part = _part(flat, starts[indices[row]], shape)
            self._take(number, part, tally_plain, axis, self._slopes.get(number), extents.get(row))
        self._make_rows(flat, starts, row_at if is_native else None)
        self._row_at, self._range_at = row_at, range_at

    def _make_rows(self, flat: torch.Tensor, starts: IntArray, row_at: IntArray | None) -> None:
        """Tally the rows of gradients; where C can read them, all of those by one call that are uniform."""
        numbers, indices, rows, widths = np.array(self._gradients, np.int64).reshape(-1, 4).T
        by_itself = np.arange(numbers.size)
        if row_at is not None and numbers.size:
            zeros = native.zero_rows_in(flat, starts[indices], rows, widths)
            is_uniform = (zeros == 0) | (zeros == rows)
            uniform, by_itself = np.flatnonzero(is_uniform), np.flatnonzero(~is_uniform)
            samples = np.array([self.samples[number] for number in numbers[uniform].tolist()], np.int64)
            self._rows = Rows(rows[uniform], np.where(zeros[uniform] == 0, samples, 0))
            row_at[numbers[uniform]] = np.arange(uniform.size)
        for row in by_itself.tolist():
            part = _part(flat, starts[indices[row]], (int(rows[row]), int(widths[row])))
            self._take(int(numbers[row]), part, tally_rows, 0, self.samples[numbers[row]])

    def _take(self, number: int, part: torch.Tensor, make: Callable[..., object], *arguments: Any) -> None:
        """Make one tally; what goes wrong is told to whoever asks for it, and to nobody else."""
        try:
            tally = make(part, *arguments)
            assert isinstance(tally, UnitTally)
            self._found[number] = tally
        except Exception as error:
            self._found[number] = error


@functools.lru_cache(maxsize=1024)
def _cube(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """As how many samples, units and positions a tensor is read, and of how many one is looked at for the scale."""
    cube = sides(shape, axis)
    return cube, scale_steps(*cube)


def _part(flat: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of one tensor, in its shape."""
    return flat[start : start + int(np.prod(shape))].view(shape)
