"""Tallies of small tensors that are measured together, worked out with their sketches by whoever measures them.

By itself the tally of a few hundred values took 30 us of the training thread, and the rows of a small gradient 12. As
the values have been copied anyway, that thread notes what is wanted, and one call finds the ranges of all. Where a
range is all that is wanted, those of many tensors stay side by side: a tally for each, and what follows them one by
one, took 12 us.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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

__all__ = ["LateTallies", "LateTally", "Ranges"]


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


_NO_RANGES = Ranges(*(np.empty(0, np.int64),) * 2, *(np.empty(0),) * 3)


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

    It stands in flat lists, since a tuple for each would keep the garbage collector busy.
    """

    __slots__ = ("_activations", "_found", "_gradients", "_ranges", "_rows", "_shapes", "samples")

    def __init__(self) -> None:
        self.samples: list[int] = []
        """Of each tally how many samples it is of."""
        self._activations: list[Any] = []
        self._gradients: list[int] = []
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._found: dict[int, UnitTally | Exception] = {}
        self._ranges = _NO_RANGES
        self._rows: dict[int, int] = {}
        """Number of each tally of a range alone to its row among those."""

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
        self._activations += (len(self.samples), index, self._shapes.setdefault(shape, shape), axis, slopes)
        self.samples.append(math.prod(shape[:axis]))
        return len(self.samples) - 1

    def add_rows(self, wanted: Iterable[tuple[int, int, int, int]]) -> int:
        """Want tallies of the rows of gradients that are zero; see `instrument.measure.units.tally_rows`.

        Args:
            wanted: Of each its place in the group, how many rows it has, of how many values, and its samples.

        Returns:
            The number of the first tally.
        """
        first = len(self.samples)
        for number, (index, rows, width, samples) in enumerate(wanted, first):
            self._gradients += (number, index, rows, width, samples)
            self.samples.append(samples)
        return first

    def found(self, number: int) -> UnitTally | Exception | None:
        """The tally of this number, or what went wrong; None where it was not made."""
        row = self._rows.get(number)
        return self._found.get(number) if row is None else tally_of_range(self._ranges.at(row))

    def ranges(self, numbers: Sequence[int]) -> tuple[list[int], Ranges]:
        """Of which of some tallies the range is all there is; see `Group.ranges`."""
        rows = [self._rows.get(number, -1) for number in numbers]
        places = [place for place, row in enumerate(rows) if row >= 0]
        return places, self._ranges.take(np.array([row for row in rows if row >= 0], np.intp))

    def make(self, flat: torch.Tensor, starts: IntArray) -> None:
        """Work out all that is wanted; call it under `Unseen`.

        Args:
            flat: The values of the group, of shape (n,).
            starts: Where those of each tensor begin.
        """
        is_native = native.can_measure(flat)
        activations, gradients = list(_by_fives(self._activations)), list(_by_fives(self._gradients))
        if is_native and activations:
            ranges = _ranges(flat, starts, activations)
            alone = [row for row, (*_, slopes) in enumerate(activations) if slopes is None]
            extents: dict[int, Extent | None] = {
                row: ranges.at(row) for row, (*_, slopes) in enumerate(activations) if slopes is not None
            }
            self._ranges = ranges.take(np.array(alone, np.intp))
            self._rows = {activations[row][0]: place for place, row in enumerate(alone)}
        else:
            extents = dict.fromkeys(range(len(activations)))
        for row, extent in extents.items():
            number, index, shape, axis, slopes = activations[row]
            self._take(number, _part(flat, starts[index], shape), tally_plain, axis, slopes, extent)
        zeros = _zeros(flat, starts, gradients) if is_native else itertools.repeat(None, len(gradients))
        for (number, index, rows, width, samples), zero in zip(gradients, zeros, strict=True):
            if zero == 0:
                self._found[number] = living_rows(rows, samples)
            elif zero == rows:
                self._found[number] = zero_rows(rows)
            else:
                self._take(number, _part(flat, starts[index], (rows, width)), tally_rows, 0, samples)

    def _take(self, number: int, part: torch.Tensor, make: Callable[..., object], *arguments: Any) -> None:
        """Make one tally; what goes wrong is told to whoever asks for it, and to nobody else."""
        try:
            tally = make(part, *arguments)
            assert isinstance(tally, UnitTally)
            self._found[number] = tally
        except Exception as error:
            self._found[number] = error


def _ranges(flat: torch.Tensor, starts: IntArray, wanted: Sequence[tuple[Any, ...]]) -> Ranges:
    """Ranges of the units of all tensors, by one call in C."""
    sizes, steps = zip(*(_cube(shape, axis) for _, _, shape, axis, _ in wanted), strict=True)
    places, cubes = starts[[index for _, index, *_ in wanted]], np.array(sizes)
    return Ranges(cubes[:, 0], cubes[:, 1], *native.ranges_of_many(flat, places, cubes, np.array(steps)))


@functools.lru_cache(maxsize=1024)
def _cube(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """As how many samples, units and positions a tensor is read, and of how many one is looked at for the scale."""
    cube = sides(shape, axis)
    return cube, scale_steps(*cube)


def _zeros(flat: torch.Tensor, starts: IntArray, wanted: Sequence[tuple[Any, ...]]) -> list[int]:
    """How many rows of each gradient are zero, by one call in C."""
    if not wanted:
        return []
    _, places, rows, widths, _ = np.array(wanted, np.int64).T
    zeros: list[int] = native.zero_rows_in(flat, starts[places], rows, widths).tolist()
    return zeros


def _part(flat: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of one tensor, in its shape."""
    return flat[start : start + int(np.prod(shape))].view(shape)


def _by_fives(flat: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Each five entries that belong together."""
    entries = iter(flat)
    return zip(entries, entries, entries, entries, entries, strict=True)
