"""Many sketches as columns of numbers: what is worked out for a whole step at once.

An object for each of a thousand sketches, with two arrays of its own, took 10 us a sketch and step to make, to ask and
to pack, and the interpreter lock all that time. Tensors that are measured together are columns from the start; a
`Sketch` is made where somebody asks for one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from instrument.measure import recycling
from instrument.measure.histogram import INF_CODE, FloatArray, IntArray
from instrument.measure.sketch import Sketch

__all__ = ["FIELDS", "Sketches", "made", "runs_of"]

FIELDS = (
    "total", "total_squares", "low", "high", "count", "zero_count", "nan_count", "inf_count", "histogram_share"
)  # fmt: skip
"""What the columns of `Sketches.numbers` are: the fields of a sketch besides codes and counts."""

_WHOLE = slice(FIELDS.index("count"), FIELDS.index("inf_count") + 1)
_SPOILT = slice(FIELDS.index("nan_count"), FIELDS.index("inf_count") + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Sketches:
    """Sketches one behind the other.

    Example:
        >>> import torch
        >>> from instrument import measure
        >>> sketches = Sketches.of([measure(torch.ones(2)), measure(torch.zeros(3))])
        >>> len(sketches), sketches[1].zero_count
        (2, 3)
    """

    codes: npt.NDArray[np.uint16]
    """Codes that occur, rising within each sketch."""

    counts: IntArray
    """How often."""

    ends: IntArray
    """Where those of each sketch end, of shape (sketches,)."""

    numbers: FloatArray
    """The other fields, of shape (sketches, `FIELDS`): float64, in which whole numbers are exact below 2**53."""

    @classmethod
    def of(cls, sketches: Sequence[Sketch]) -> Sketches:
        """The columns of sketches that were made one by one."""
        if not sketches:
            return cls(np.empty(0, np.uint16), np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(FIELDS))))
        numbers = np.array(
            [
                (s.total, s.total_squares, s.low, s.high, s.count, s.zero_count, s.nan_count, s.inf_count,
                 s.histogram_share) for s in sketches
            ]
        )  # fmt: skip
        codes, counts = [s.codes for s in sketches], [s.counts for s in sketches]
        return cls(np.concatenate(codes), np.concatenate(counts), np.cumsum([each.size for each in codes]), numbers)

    @classmethod
    def joined(cls, parts: Sequence[Sketches]) -> Sketches:
        """Those of several, one behind the other."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.of(())
        sizes = np.array([0, *(part.codes.size for part in parts[:-1])])
        return cls(
            recycling.joined([part.codes for part in parts]),
            recycling.joined([part.counts for part in parts]),
            np.concatenate([part.ends + first for part, first in zip(parts, np.cumsum(sizes), strict=True)]),
            np.concatenate([part.numbers for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Sketch:
        start = int(self.ends[index - 1]) if index else 0
        # Copies: a sketch that somebody keeps would keep all of them, and its arrays may be changed.
        own = slice(start, int(self.ends[index]))
        return made(self.codes[own].copy(), self.counts[own].copy(), self.numbers[index].tolist())

    def __iter__(self) -> Iterator[Sketch]:
        return map(self.__getitem__, range(len(self)))

    def column(self, field: str) -> FloatArray:
        """One field of all sketches, of shape (sketches,)."""
        return self.numbers[:, FIELDS.index(field)]

    def part(self, start: int, end: int) -> Sketches:
        """Those from one place to before another, in the same memory."""
        if start == 0 and end == len(self):
            return self
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[end - 1]) if end else 0
        return Sketches(
            self.codes[first:last], self.counts[first:last], self.ends[start:end] - first, self.numbers[start:end]
        )

    def take(self, places: IntArray) -> Sketches:
        """Those at places, in their order."""
        runs = runs_of(places)
        if runs is not None:
            return Sketches.joined([self.part(first, end) for first, end in runs])
        sizes = np.diff(self.ends, prepend=0)
        taken = sizes[places]
        ends = np.cumsum(taken)
        wanted = np.arange(ends[-1]) + np.repeat((self.ends - sizes)[places] - (ends - taken), taken)
        return Sketches(self.codes[wanted], self.counts[wanted], ends, self.numbers[places])

    def finite(self) -> Sketches:
        """The same without the codes of NaN and Inf."""
        if not self.numbers[:, _SPOILT].any():
            return self
        wanted = (self.codes & 0x7FF) < INF_CODE
        ends = np.concatenate(([0], np.cumsum(wanted)))[self.ends]
        return Sketches(self.codes[wanted], self.counts[wanted], ends, self.numbers)


_LEAST_RUN = 16
"""Sketches of a run, on average, from which on it is quicker to copy runs than to look each sketch up."""


def runs_of(places: IntArray) -> list[tuple[int, int]] | None:
    """Places that follow each other, as first ones and ends; None where such runs are short."""
    if not len(places):
        return []
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    if breaks.size > len(places) // _LEAST_RUN:
        return None
    cuts = [0, *breaks.tolist(), len(places)]
    return [(int(places[start]), int(places[end - 1]) + 1) for start, end in itertools.pairwise(cuts)]


def made(codes: npt.NDArray[np.uint16], counts: IntArray, numbers: Sequence[float]) -> Sketch:
    """A sketch of its codes, counts and `FIELDS`; a frozen dataclass itself sets its fields by one slow call each."""
    sketch = object.__new__(Sketch)
    fields = dict(zip(FIELDS, numbers, strict=True))
    for name in FIELDS[_WHOLE]:
        fields[name] = int(fields[name])
    sketch.__dict__.update(fields, codes=codes, counts=counts)
    return sketch
