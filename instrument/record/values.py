"""What TensorBoard is given of a step: scalars and histograms of all tensors.

They are worked out for many tensors together, since the arrays of one are shorter than the calls of NumPy, and slice
by slice: between two slices the training thread may have the interpreter lock, which is never held for long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from instrument.config import SECTIONS
from instrument.measure import native
from instrument.measure.columns import Sketches
from instrument.measure.histogram import FloatArray, Histograms, IntArray, Knots, histograms, log10_histograms
from instrument.record.buffer import StepRecord
from instrument.record.tags import COUNTS, LOG10, LOG10_KINDS, STATISTICS

__all__ = ["HistogramSlice", "histogram_slices", "scalar_values"]

_SPREAD_SECTIONS = frozenset(SECTIONS[kind] for kind in LOG10_KINDS)

_STATISTICS, _COUNTS = tuple(STATISTICS), tuple(COUNTS)

_TOGETHER = 4096
"""Histograms worked out together: C and NumPy give the lock up in each of their calls, and those are few."""


class HistogramSlice(NamedTuple):
    """Several histograms, one behind the other."""

    tags: tuple[str, ...]
    low: FloatArray
    """Left edge of the first bucket of each."""
    high: FloatArray
    """Right edge of the last."""
    num: FloatArray
    """Values of each."""
    total: FloatArray
    """Their sum."""
    total_squares: FloatArray
    """The sum of their squares."""
    limits: FloatArray
    """Right edges of all buckets."""
    counts: FloatArray
    """Counts of all buckets."""
    ends: IntArray
    """Where the buckets of each end."""

    def rows(self) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
        """Tag, the five numbers from `low` to `total_squares`, right edges and counts of each histogram."""
        numbers = np.stack(self[1:6], axis=1).tolist()
        limits, counts = self.limits.tolist(), self.counts.tolist()
        start = 0
        for tag, five, end in zip(self.tags, numbers, self.ends.tolist(), strict=True):
            yield tag, five, limits[start:end], counts[start:end]
            start = end


def scalar_values(record: StepRecord, counted: set[str]) -> tuple[tuple[str, ...], FloatArray]:
    """Tags and numbers of the scalars of a step record.

    Args:
        record: The sketches of a step.
        counted: Tags of counts of NaN and Inf that were above zero before; added to here.

    Returns:
        Tags, and as many numbers of shape (n,).
    """
    table = record.statistics()
    has_values = ~np.isnan(table[:, 0])
    is_spoilt = table[:, len(_STATISTICS) :].any()
    if has_values.all() and not is_spoilt and not counted:
        return _usual_tags(record.tags), table[:, : len(_STATISTICS)].ravel()
    tags: list[str] = []
    numbers: list[float] = []
    for tag, has_value, row in zip(record, has_values.tolist(), table.tolist(), strict=True):
        if has_value:
            tags += _tags_under(tag, _STATISTICS)
            numbers += row[: len(_STATISTICS)]
        for scalar_tag, number in zip(_tags_under(tag, _COUNTS), row[len(_STATISTICS) :], strict=True):
            if number or scalar_tag in counted:
                counted.add(scalar_tag)
                tags.append(scalar_tag)
                numbers.append(number)
    return tuple(tags), np.array(numbers, np.float64)


@functools.lru_cache(maxsize=8)
def _usual_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    """Tags of the scalars of a step without NaN or Inf, in which every tensor has a value; most steps are alike."""
    return tuple(scalar_tag for tag in tags for scalar_tag in _tags_under(tag, _STATISTICS))


@functools.lru_cache(maxsize=65_536)
def _tags_under(tag: str, statistics: tuple[str, ...]) -> tuple[str, ...]:
    """Tags of the statistics of what is under a tag; they come again each step."""
    section, _, name = tag.partition("/")
    return tuple(f"{section}.{statistic}/{name}" for statistic in statistics)


def histogram_slices(record: StepRecord) -> Iterator[HistogramSlice]:
    """The histograms of a step record, a slice at a time.

    NaN and Inf reach no edge and no bucket: one such step would blank the card for every step.

    Args:
        record: The sketches of a step.

    Yields:
        Histograms of the values, and of log10 of magnitudes where those are spread over decades.
    """
    tags, sketches = record.tags, record.columns().finite()
    count, zeros = sketches.column("count"), sketches.column("zero_count")
    is_spread = _are_spread(tags) & (count > zeros)
    for wanted, with_log10 in ((~is_spread & (count > 0), False), (is_spread, True)):
        for places, own, log10_tags in _cut(tags, wanted.tobytes(), with_log10):
            yield from _slices(own, log10_tags, sketches.take(places))


@functools.lru_cache(maxsize=16)
def _cut(
    tags: tuple[str, ...], wanted: bytes, with_log10: bool
) -> list[tuple[npt.NDArray[np.intp], tuple[str, ...], tuple[str, ...]]]:
    """Some of the tags in parts, with their places, and those of log10 where wanted; they come again each step."""
    places = np.frombuffer(wanted, np.bool_).nonzero()[0]
    found = []
    for start in range(0, places.size, _TOGETHER):
        part = places[start : start + _TOGETHER]
        own = tuple([tags[place] for place in part.tolist()])
        found.append((part, own, tuple([_tags_under(tag, (LOG10,))[0] for tag in own] if with_log10 else ())))
    return found


@functools.lru_cache(maxsize=8)
def _are_spread(tags: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Whether a histogram of log10 belongs to each tag; the same tags come again each step."""
    return np.array([tag.partition("/")[0] in _SPREAD_SECTIONS for tag in tags], np.bool_)


def _slices(tags: tuple[str, ...], log10_tags: tuple[str, ...], sketches: Sketches) -> Iterator[HistogramSlice]:
    total, squares = sketches.column("total"), sketches.column("total_squares")
    nothing = np.zeros(len(tags))
    log10: Callable[[], Histograms]
    if native.is_there():
        linear, numbers = native.histograms_of(sketches)
        count, zeros, smallest = numbers.T
        log10 = functools.partial(native.log10_histograms_of, sketches, smallest)
    else:
        knots = Knots(sketches.codes, sketches.counts, sketches.ends, sketches.column("low"), sketches.column("high"))
        linear, count, zeros = histograms(knots), knots.count.astype(np.float64), knots.zeros
        log10 = functools.partial(log10_histograms, knots)
    yield _slice(tags, linear, count, total, squares)
    if log10_tags:
        yield _slice(log10_tags, log10(), count - zeros, nothing, nothing)


def _slice(
    tags: tuple[str, ...], found: Histograms, num: FloatArray, total: FloatArray, squares: FloatArray
) -> HistogramSlice:
    high = found.limits[found.ends - 1]
    return HistogramSlice(tags, found.first, high, num, total, squares, found.limits, found.counts, found.ends)
