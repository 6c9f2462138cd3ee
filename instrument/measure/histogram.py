"""From counts of codes to distributions: quantiles' knots, and the histograms that TensorBoard is given.

Within a code, whose bounds are 1/8 apart, values are taken to be spread evenly. Counts of buckets are differences of
the rounded cumulative count at their edges, so that they are whole and sum to the count exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "CODES",
    "GRID",
    "INF_CODE",
    "SIGN",
    "SMALLEST",
    "CodeCounts",
    "FloatArray",
    "Histograms",
    "IntArray",
    "Knots",
    "count_below",
    "divided",
    "histograms",
    "log10_edges",
    "log10_histograms",
    "pure_codes",
]

CODES = 4096
"""Number of codes: sign, 8 exponent bits and 3 mantissa bits of a float32."""

INF_CODE = 0x7F8
"""First code without sign that is not finite."""

SIGN = 2048
"""The bit of a code that stands for the sign."""

HISTOGRAM_BUCKETS = 64
LOG10_BUCKETS = 48
SMALLEST = 2.0**-149
"""Smallest positive float32, the lower bound of the first code that is not zero."""

FloatArray: TypeAlias = "npt.NDArray[np.float64]"
IntArray: TypeAlias = "npt.NDArray[np.int64]"


def _bounds_of_codes() -> tuple[FloatArray, FloatArray]:
    """Lower and upper bound of the magnitudes in each of the 2040 finite codes without sign."""
    bits = np.arange(INF_CODE + 1, dtype=np.uint32) << np.uint32(20)
    bounds = bits.view(np.float32).astype(np.float64)
    low, high = bounds[:-1].copy(), bounds[1:].copy()
    low[0] = high[0] = low[1] = 0.0
    high[-1] = np.finfo(np.float32).max
    return low, high


_LOW, _HIGH = _bounds_of_codes()
_FILLER = np.zeros(SIGN - INF_CODE)
_LEFT = np.concatenate((_LOW, _FILLER, -_HIGH, _FILLER))
_RIGHT = np.concatenate((_HIGH, _FILLER, -_LOW, _FILLER))
"""Bounds of the values in each code, the sign included."""

_RANKS = np.concatenate((np.arange(SIGN, 2 * SIGN), np.arange(SIGN, 0, -1)))
"""Place of each code in the order of values; the two codes of zero share one."""

_HALF = np.arange(1, HISTOGRAM_BUCKETS // 2 + 1) / (HISTOGRAM_BUCKETS // 2)
GRID = np.concatenate((-(_HALF[::-1] ** 3), [0.0, 0.0], _HALF**3))
"""Edges of the buckets of values whose largest magnitude is 1; zero stands twice."""

ZERO = HISTOGRAM_BUCKETS // 2
"""Where in the grid of edges the first of the two zeros stands."""


class CodeCounts(NamedTuple):
    """What a histogram is made of: codes of finite values, rising, how often each occurs, and the extremes."""

    codes: npt.NDArray[np.uint16]
    counts: IntArray
    low: float
    high: float


class Knots:
    """Cumulative distributions of several tensors, linear between knots; built for all of them at once.

    One call of NumPy takes a microsecond or more however short its arrays are, so that hundreds of tensors are
    worked on together wherever possible.

    Args:
        codes: Codes of finite values, rising within each tensor, of which each has one at least.
        counts: How often each occurs.
        ends: Where the codes of each tensor end.
        low: The smallest value of each tensor.
        high: The largest.
    """

    def __init__(
        self, codes: npt.NDArray[np.uint16], counts: IntArray, ends: IntArray, low: FloatArray, high: FloatArray
    ) -> None:
        codes = codes.astype(np.intp)
        lengths = np.diff(ends, prepend=0)
        starts = ends - lengths
        self.low = low
        self.high = high
        self.abs_max = np.maximum(-self.low, self.high)
        # Codes rise with the magnitude on both sides of zero: in the order of values come the negative ones,
        # backwards, then the others.
        negative_codes = np.add.reduceat(codes >= SIGN, starts, dtype=np.intp)
        place = np.arange(codes.size) - np.repeat(starts, lengths)
        is_negative = place < np.repeat(negative_codes, lengths)
        backwards = np.repeat(ends - 1, lengths) - place
        forwards = place + np.repeat(starts - negative_codes, lengths)
        order = np.where(is_negative, backwards, forwards)
        codes, counts = codes[order], counts[order]
        left, right = _LEFT[codes], _RIGHT[codes]
        left[starts] = self.low
        right[ends - 1] = self.high
        self._left, self._right = np.minimum(left, np.repeat(self.high, lengths)), right
        below = np.cumsum(counts)
        first = below[starts] - counts[starts]
        self._counts = counts.astype(np.float64)
        self._before = (below - counts - np.repeat(first, lengths)).astype(np.float64)
        self._keys = _RANKS[codes] + np.repeat(np.arange(lengths.size) * (2 * SIGN), lengths)
        self._ends = ends
        self.count = below[ends - 1] - first
        """Values of each tensor."""
        self.negatives = np.add.reduceat(np.where(codes > SIGN, counts, 0), starts)
        """Those below zero."""
        self.zeros = np.add.reduceat(np.where(codes & 0x7FF == 0, counts, 0), starts)
        """Those that are zero."""
        smallest = np.where(codes & 0x7FF == 0, SIGN, codes & 0x7FF)
        self.smallest = np.maximum(_LOW[np.minimum(np.minimum.reduceat(smallest, starts), INF_CODE - 1)], SMALLEST)
        """A lower bound of the magnitudes of those that are not zero."""

    @classmethod
    def of(cls, part: CodeCounts) -> Knots:
        """Those of one tensor."""
        ends, low, high = np.array([part.codes.size]), np.array([part.low]), np.array([part.high])
        return cls(part.codes, part.counts, ends, low, high)

    def below(self, values: FloatArray) -> FloatArray:
        """How many values of each tensor lie below given ones that are not zero, of shape (tensors, n).

        All are looked up by one search among the codes of all tensors: the code of a value says in which of them it
        lies, and how far into it, how many of those counted there are below.
        """
        rank = np.sign(values).astype(np.intp) * _code_of(np.abs(values)) + SIGN
        wanted = rank + np.arange(len(values))[:, None] * (2 * SIGN)
        place = np.searchsorted(self._keys, wanted)
        inside = np.minimum(place, self._keys.size - 1)
        is_inside = self._keys[inside] == wanted
        left, right = self._left[inside], self._right[inside]
        with np.errstate(over="ignore"):  # what lies elsewhere may be far away
            share = np.clip((values - left) / np.where(right > left, right - left, 1.0), 0.0, 1.0)
        before = np.where(is_inside, self._before[inside] + self._counts[inside] * share, self._before[inside])
        found: FloatArray = np.where(place < self._ends[:, None], before, self.count[:, None])
        return found

    def quantile(self, q: float) -> FloatArray:
        """The value of each tensor below which a share of its values lies."""
        places = np.stack((self._left, self._right), axis=1)
        below = np.stack((self._before, self._before + self._counts), axis=1)
        rows = zip(self.count, np.split(places, self._ends[:-1]), np.split(below, self._ends[:-1]), strict=True)
        return np.array([np.interp(q * count, steps.ravel(), values.ravel()) for count, values, steps in rows])


class Histograms(NamedTuple):
    """Histograms of several tensors, one behind the other."""

    counts: FloatArray
    """Counts of all buckets; whole numbers."""
    limits: FloatArray
    """Right edges of all buckets."""
    first: FloatArray
    """Left edge of the first bucket of each tensor."""
    ends: IntArray
    """Where the buckets of each tensor end."""

    def one(self, index: int) -> tuple[IntArray, FloatArray]:
        """Counts and edges of one tensor."""
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return self.counts[part].astype(np.int64), np.concatenate((self.first[index : index + 1], self.limits[part]))


def histograms(knots: Knots) -> Histograms:
    """Histograms with narrow buckets near zero; see `instrument.measure.sketch.Sketch.histogram`."""
    low, high, zeros = knots.low[:, None], knots.high[:, None], knots.zeros[:, None]
    edges = knots.abs_max[:, None] * GRID
    inside = (edges > low) & (edges < high)
    below = np.rint(knots.below(edges))
    # Two edges stand at zero: between them lies the bucket of the zeros, where there are any.
    below[:, ZERO] = knots.negatives
    below[:, ZERO + 1] = knots.negatives + knots.zeros
    inside[:, ZERO] = ((low < 0) & ((zeros > 0) | (high > 0)))[:, 0]
    inside[:, ZERO + 1] = ((zeros > 0) & (high > 0))[:, 0]
    inside = np.concatenate((inside, np.ones_like(high, np.bool_)), axis=1)
    edges = np.concatenate((edges, high), axis=1)
    below = np.concatenate((below, knots.count[:, None]), axis=1)
    cumulative = below[inside]
    ends = np.cumsum(inside.sum(axis=1))
    counts = np.diff(cumulative, prepend=0.0)
    counts[ends[:-1]] = cumulative[ends[:-1]]
    return Histograms(counts, edges[inside], knots.low, ends)


def log10_histograms(knots: Knots) -> Histograms:
    """Histograms of log10 of magnitudes; see `instrument.measure.sketch.Sketch.log10_histogram`.

    Tensors without a value that is not zero have one empty bucket.
    """
    nonzero = knots.count - knots.zeros
    edges, magnitudes = log10_edges(knots.smallest, knots.abs_max)
    below = np.rint(knots.below(magnitudes) - knots.below(-magnitudes) - knots.zeros[:, None])
    below[:, 0], below[:, -1] = 0.0, nonzero
    counts = np.diff(below, axis=1)
    ends = np.cumsum(np.full(len(counts), LOG10_BUCKETS))
    return Histograms(counts.ravel(), edges[:, 1:].ravel(), edges[:, 0], ends)


def log10_edges(smallest: FloatArray, largest: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Edges of the buckets of log10 of magnitudes.

    Args:
        smallest: A lower bound of the magnitudes of each tensor.
        largest: The largest of them.

    Returns:
        The edges, evenly spaced, and the magnitudes there; of shape (tensors, `LOG10_BUCKETS` + 1).
    """
    largest = np.maximum(largest, SMALLEST)
    low, high = np.log10(np.minimum(smallest, largest))[:, None], np.log10(largest)[:, None]
    edges = low + (high - low) * np.linspace(0.0, 1.0, LOG10_BUCKETS + 1)
    return edges, 10.0**edges


def count_below(part: CodeCounts, threshold: float) -> float:
    """How many values that are not zero have a magnitude below a threshold."""
    bare = (part.codes & 0x7FF).astype(np.intp)
    low, high, counts = (array[bare > 0] for array in (_LOW[bare], _HIGH[bare], part.counts))
    return float((counts * np.clip((threshold - low) / (high - low), 0.0, 1.0)).sum())


def divided(codes: npt.NDArray[np.uint16], counts: IntArray, scale: float) -> tuple[npt.NDArray[np.uint16], IntArray]:
    """Codes and counts of values divided by a positive number; zeros, NaN and Inf stay what they are.

    Values that would leave the range of float32 at either end stay in its last code there.
    """
    bare = (codes & 0x7FF).astype(np.intp)
    special = (bare == 0) | (bare >= INF_CODE)
    dense = np.zeros(CODES, np.int64)
    dense[codes[special]] = counts[special]
    moved, amount, sign = bare[~special], counts[~special], (codes[~special] & SIGN).astype(np.intp)
    below = _code_of(_LOW[moved] / scale)
    above = _code_of(np.nextafter(_HIGH[moved] / scale, 0.0))
    # The share of a code's values that stay below the bound that lies within it, where one does.
    bound = _LOW[above]
    width = (_HIGH[moved] - _LOW[moved]) / scale
    share = np.where(above > below, (bound - _LOW[moved] / scale) / width, 1.0)
    lower = np.rint(amount * np.clip(share, 0.0, 1.0)).astype(np.int64)
    np.add.at(dense, below + sign, lower)
    np.add.at(dense, above + sign, amount - lower)
    present = dense.nonzero()[0]
    return present.astype(np.uint16), dense[present]


def pure_codes(single: npt.NDArray[np.float32], exact: npt.NDArray[Any]) -> IntArray:
    """Codes with sign, of which 0 and 2048 are those of zeros alone.

    Args:
        single: The values as float32, of shape (n,).
        exact: The values themselves, of shape (n,), which may be too small for float32 and yet not zero.

    Returns:
        Int64 of shape (n,).
    """
    codes: IntArray = (single.view(np.uint32) >> np.uint32(20)).astype(np.int64)
    codes[((codes & (SIGN - 1)) == 0) & (exact != 0)] += 1
    return codes


def spread(counts: IntArray, zeros: int, others: int) -> IntArray | None:
    """Counts of a sample as whole numbers that sum to the counts of all: so many zeros, and so many others.

    Args:
        counts: Int64 of shape (4096,); those of zeros are cleared.
        zeros: Zeros among all values.
        others: Other values.

    Returns:
        Int64 of shape (4096,); None where the sample has none of those that are not zero, though there are some.
    """
    counts[0] = counts[SIGN] = 0
    below = np.cumsum(counts)
    if others and not below[-1]:
        return None
    found: IntArray = np.diff(np.rint(below * (others / max(1, int(below[-1])))), prepend=0.0).astype(np.int64)
    found[0] = zeros
    return found


def _code_of(magnitudes: FloatArray) -> npt.NDArray[np.intp]:
    """Codes without sign of magnitudes that are not zero."""
    single = np.clip(magnitudes, 0.0, np.finfo(np.float32).max).astype(np.float32)
    codes: npt.NDArray[np.intp] = (single.view(np.uint32) >> np.uint32(20)).astype(np.intp)
    return np.maximum(codes, 1)
