"""From counts of codes to distributions: quantiles' knots, and the histograms that TensorBoard is given.

Within a code, whose bounds are 1/8 apart, values are taken to be spread evenly. Counts of buckets are differences of
the rounded cumulative count at their edges, so that they are whole and sum to the count exactly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CODES", "INF_CODE", "CodeCounts", "FloatArray", "IntArray", "histogram", "log10_histogram"]

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


@dataclasses.dataclass(frozen=True)
class CodeCounts:
    """Codes of finite values that occur, rising, and how often each does."""

    codes: npt.NDArray[np.uint16]
    counts: IntArray

    @property
    def zeros(self) -> int:
        """How many values are zero."""
        return int(self.counts[(self.codes & 0x7FF) == 0].sum())

    @property
    def negatives(self) -> int:
        """How many values are below zero."""
        return int(self.counts[self.codes > SIGN].sum())

    def magnitudes(self) -> tuple[npt.NDArray[np.intp], IntArray]:
        """Codes without sign of the values that are not zero, rising, and how often each occurs."""
        dense = np.zeros(SIGN, np.int64)
        split = int(np.searchsorted(self.codes, SIGN))
        dense[self.codes[:split]] += self.counts[:split]
        dense[self.codes[split:] & 0x7FF] += self.counts[split:]
        dense[0] = 0
        present = dense.nonzero()[0]
        return present, dense[present]

    def below(self, threshold: float) -> float:
        """How many values that are not zero have a magnitude below a threshold."""
        magnitudes, counts = self.magnitudes()
        low, high = _LOW[magnitudes], _HIGH[magnitudes]
        return float((counts * np.clip((threshold - low) / (high - low), 0.0, 1.0)).sum())

    def distribution(self, lowest: float, highest: float) -> tuple[FloatArray, FloatArray]:
        """Knots of the cumulative distribution: places, and how many values lie at or below each."""
        bare = (self.codes & 0x7FF).astype(np.intp)
        split = int(np.searchsorted(self.codes, SIGN))
        order = np.concatenate((np.arange(len(bare) - 1, split - 1, -1), np.arange(split)))
        negative = self.codes >= SIGN
        left = np.where(negative, -_HIGH[bare], _LOW[bare])[order]
        right = np.where(negative, -_LOW[bare], _HIGH[bare])[order]
        left[0], right[-1] = lowest, highest
        return _knots(np.clip(left, lowest, highest), np.clip(right, lowest, highest), self.counts[order])


def histogram(found: CodeCounts, lowest: float, highest: float) -> tuple[IntArray, FloatArray]:
    """Counts and edges of the values; see `instrument.measure.sketch.Sketch.histogram`."""
    count = int(found.counts.sum())
    if not count:
        return np.empty(0, np.int64), np.zeros(1)
    if lowest == highest:
        return np.array([count]), np.array([lowest, highest])
    u = np.arange(1, HISTOGRAM_BUCKETS // 2) / (HISTOGRAM_BUCKETS // 2)
    inner = u**3 * max(-lowest, highest)
    has_zeros = found.zeros > 0
    edges = np.concatenate((-inner[::-1], [0.0, 0.0] if has_zeros else [0.0], inner))
    inside = (edges > lowest) & (edges < highest)
    edges = edges[inside | (edges == 0.0)] if has_zeros else edges[inside]
    if not has_zeros or lowest < 0.0:
        edges = np.concatenate(([lowest], edges))
    if not has_zeros or highest > 0.0:
        edges = np.concatenate((edges, [highest]))
    cumulative = np.interp(edges, *found.distribution(lowest, highest))
    if has_zeros:
        cumulative[np.searchsorted(edges, 0.0)] = found.negatives
    return _counts_between(cumulative), edges


def log10_histogram(found: CodeCounts, lowest: float, highest: float) -> tuple[IntArray, FloatArray]:
    """Counts and edges of log10 of magnitudes; see `instrument.measure.sketch.Sketch.log10_histogram`."""
    magnitudes, counts = found.magnitudes()
    if not counts.size:
        return np.empty(0, np.int64), np.zeros(1)
    left = np.log10(np.maximum(_LOW[magnitudes], SMALLEST))
    right = np.log10(_HIGH[magnitudes])
    right[-1] = math.log10(max(-lowest, highest))
    right = np.maximum(right, left)
    if left[0] == right[-1]:
        return np.array([int(counts.sum())]), np.array([left[0], right[-1]])
    edges = np.linspace(left[0], right[-1], LOG10_BUCKETS + 1)
    return _counts_between(np.interp(edges, *_knots(left, right, counts))), edges


def _knots(left: FloatArray, right: FloatArray, counts: IntArray) -> tuple[FloatArray, FloatArray]:
    """Places and cumulative counts where the counts of rising intervals are spread evenly."""
    below = np.concatenate(([0], np.cumsum(counts))).astype(np.float64)
    return np.stack((left, right), axis=1).ravel(), np.repeat(below, 2)[1:-1]


def _counts_between(cumulative: FloatArray) -> IntArray:
    """Whole counts between edges, of the count at or below each."""
    cumulative[0] = 0.0
    return np.diff(np.rint(cumulative)).astype(np.int64)
