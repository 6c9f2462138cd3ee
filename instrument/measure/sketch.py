"""The sketch: what is kept of a tensor's values, and everything that is computed from it.

A value's *code* is the top 12 bits of it as float32: sign, 8 bits of exponent, 3 of mantissa. The counts of the
4096 codes and four moments in float64 (sum, sum of squares, minimum and maximum of the finite values) are all
that is kept; a new statistic is one function here. Sketches merge exactly: counts and sums add, extremes combine.
That makes micro-batches, repeated calls, steps and ranks one operation, and no pooled variance is ever guessed
from averages.

Two codes are kept pure, so that zeros, NaN and Inf are exact counts: code 0 (and 2048 for -0.0) holds zeros
alone, values too small for code 1 are counted there; the codes with all exponent bits set hold Inf (mantissa
bits zero) and NaN (any other). Finite float64 values beyond the range of float32 count in the last finite code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from instrument.errors import ConfigError
from instrument.measure.histogram import (
    CODES,
    INF_CODE,
    SIGN,
    CodeCounts,
    FloatArray,
    IntArray,
    Knots,
    count_below,
    divided,
    histograms,
    log10_histograms,
)

__all__ = ["CODES", "MOMENTS", "FloatArray", "IntArray", "Sketch", "empty_moments", "merge_all"]

MOMENTS = 5
"""Entries of a vector of moments: count, sum, sum of squares, minimum, maximum of the finite values."""


def empty_moments() -> FloatArray:
    """Moments of no value at all, ready to be added to: 0, 0, 0, inf, -inf."""
    return np.array([0.0, 0.0, 0.0, math.inf, -math.inf])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sketch:
    """Fixed-size, mergeable measurement of the values of one tensor; made by `instrument.measure`.

    Statistics are of the finite values; NaN and Inf are counted apart. Where there is no finite value, `mean`,
    `std`, `rms`, `min`, `max`, `abs_max` and quantiles are NaN.

    Example:
        >>> from instrument import measure
        >>> sketch = measure(torch.tensor([3.0, -4.0, 0.0, float("nan")]))
        >>> sketch.count, sketch.l2, sketch.nan_count
        (3, 5.0, 1)
    """

    codes: npt.NDArray[np.uint16]
    """The codes that occur, rising."""

    counts: IntArray
    """How often each of `codes` occurs."""

    total: float
    """Sum of the finite values."""

    total_squares: float
    """Sum of the squares of the finite values."""

    low: float
    """Smallest finite value, +inf where there is none."""

    high: float
    """Largest finite value, -inf where there is none."""

    count: int
    """Number of finite values."""

    zero_count: int
    """Number of values that are exactly zero, of either sign."""

    nan_count: int = 0
    """Number of NaN."""

    inf_count: int = 0
    """Number of positive and negative infinities."""

    histogram_share: float = 1.0
    """Share of the values that histograms and quantiles are of; everything else is of all values."""

    @classmethod
    def empty(cls) -> Sketch:
        """The sketch of no value at all, neutral under `merge`."""
        return cls(np.empty(0, np.uint16), np.empty(0, np.int64), 0.0, 0.0, math.inf, -math.inf, 0, 0)

    @classmethod
    def from_dense(cls, codes: IntArray, moments: Sequence[float], all_finite: bool = False) -> Sketch:
        """Make a sketch of accumulated counts and moments.

        Args:
            codes: Counts of the `CODES` codes, int64 of shape (4096,).
            moments: Count, sum, sum of squares, minimum, maximum of the finite values.
            all_finite: Whether it is known that NaN and Inf do not occur, which saves looking.

        Returns:
            The sketch; the arrays given may be used again.
        """
        present = _nonzero(codes)
        count, total, squares, low, high = moments
        zeros = int(codes[0] + codes[SIGN])
        nans = infs = 0
        if not all_finite:
            rare = codes[INF_CODE:SIGN] + codes[SIGN + INF_CODE :]
            infs = int(rare[0])
            nans = int(rare.sum()) - infs
        occurring, counts = present.astype(np.uint16), codes[present]
        return cls(occurring, counts, total, squares, low, high, int(count), zeros, nans, infs)

    def merge(self, *others: Sketch) -> Sketch:
        """The sketch of all values of this sketch and others together, exactly as if measured at once.

        Args:
            others: Any number of sketches.

        Returns:
            A new sketch; sums are rounded once per sketch that is added.

        Example:
            >>> from instrument import measure
            >>> measure(torch.ones(3)).merge(measure(torch.zeros(1))).mean
            0.75
        """
        return merge_all((self, *others))

    def divided(self, scale: float) -> Sketch:
        """The sketch of all values divided by a positive number, such as the scale of a gradient scaler.

        Args:
            scale: Finite and above zero. For powers of two, as scalers use by default, nothing is lost; for others
                values are spread evenly within their codes.

        Returns:
            A new sketch.

        Example:
            >>> from instrument import measure
            >>> measure(torch.tensor([512.0, 1024.0])).divided(1024.0).max
            1.0
        """
        codes, counts = divided(self.codes, self.counts, scale)
        return dataclasses.replace(
            self,
            codes=codes,
            counts=counts,
            total=self.total / scale,
            total_squares=self.total_squares / scale**2,
            low=self.low / scale,
            high=self.high / scale,
        )

    @property
    def mean(self) -> float:
        """Mean of the finite values."""
        count = self.count
        return self.total / count if count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation of the finite values; Inf from 1e154 on, whose squares are."""
        count = self.count
        if not count:
            return math.nan
        if self.low == self.high:
            return 0.0
        if math.isinf(self.total_squares):
            return math.inf
        mean = self.total / count
        return math.sqrt(max(0.0, self.total_squares / count - mean * mean))

    @property
    def rms(self) -> float:
        """Root of the mean square of the finite values."""
        count = self.count
        return math.sqrt(self.total_squares / count) if count else math.nan

    @property
    def l2(self) -> float:
        """Euclidean norm of the finite values."""
        return math.sqrt(self.total_squares)

    @property
    def min(self) -> float:
        """Smallest finite value."""
        return self.low if self.low <= self.high else math.nan

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.high if self.low <= self.high else math.nan

    @property
    def abs_max(self) -> float:
        """Largest magnitude of a finite value."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else math.nan

    @property
    def zero_fraction(self) -> float:
        """Share of the finite values that are exactly zero."""
        count = self.count
        return self.zero_count / count if count else math.nan

    def quantile(self, q: float) -> float:
        """Value below which a share of the finite values lies.

        Within a code, whose bounds are 1/8 apart, values are taken to be spread evenly; the extremes and zeros
        are exact.

        Args:
            q: Share from 0 to 1.

        Returns:
            The quantile, NaN where there is no finite value.

        Raises:
            ConfigError: `q` is no number from 0 to 1.

        Example:
            >>> from instrument import measure
            >>> measure(torch.arange(101.0)).quantile(1.0)
            100.0
        """
        if not isinstance(q, (int, float, np.floating)) or not 0.0 <= q <= 1.0:
            raise ConfigError(f"q is {q!r}, allowed is a share from 0 to 1")
        if not self.count:
            return math.nan
        return float(Knots.of(self.finite()).quantile(q)[0])

    def underflow_fraction(self, dtype: torch.dtype) -> float:
        """Share of the non-zero finite values that would become zero in a narrower type.

        A value becomes zero where it is below half of the smallest subnormal number of the type. Exact to the
        width of a code, which is 1/8.

        Args:
            dtype: A floating-point type such as `torch.float16`.

        Returns:
            A share from 0 to 1; 0 where all values are zero, NaN where there is no finite value.

        Raises:
            ConfigError: `dtype` is no floating-point type.
        """
        info = _float_info(dtype)
        nonzero = self.count - self.zero_count
        if not nonzero:
            return 0.0 if self.count else math.nan
        return count_below(self.finite(), info.tiny * info.eps / 2) / nonzero

    def overflow_fraction(self, dtype: torch.dtype) -> float:
        """Share of the finite values that would leave the range of a narrower type.

        A value leaves it where rounding takes it beyond the largest number of the type: to Inf, to NaN or,
        where a conversion saturates, back to that number. Exact to the width of a code, which is 1/8.

        Args:
            dtype: A floating-point type such as `torch.float16`.

        Returns:
            A share from 0 to 1, NaN where there is no finite value.

        Raises:
            ConfigError: `dtype` is no floating-point type.
        """
        info = _float_info(dtype)
        count = self.count
        if not count:
            return math.nan
        half_unit = info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2
        nonzero = count - self.zero_count
        return (nonzero - count_below(self.finite(), info.max + half_unit)) / count

    def histogram(self) -> tuple[IntArray, FloatArray]:
        """Counts and edges as TensorBoard is given them: at most 65 buckets, narrow near zero.

        Edges lie at ``sign(u)|u|**3 * abs_max`` for 65 even steps of u from -1 to 1; zeros have a bucket of
        width zero; the first edge is the minimum and the last the maximum, so outer buckets are never empty.
        TensorBoard rebins to 30 buckets of even width, and more of ours could not be seen. Values far from
        zero that differ little (a norm's weights, all near 1) share few buckets: codes are 1/8 wide there.

        Returns:
            Counts, integers of shape (n,) that sum to `count`, and edges, float64 of shape (n + 1,), not
            falling. Without a finite value: no bucket, and one edge at 0.

        Example:
            >>> from instrument import measure
            >>> counts, edges = measure(torch.tensor([0.0, 0.0, 2.0])).histogram()
            >>> int(counts[0]), float(edges[0]), float(edges[-1])
            (2, 0.0, 2.0)
        """
        if not self.count:
            return np.empty(0, np.int64), np.zeros(1)
        return histograms(Knots.of(self.finite())).one(0)

    def log10_histogram(self) -> tuple[IntArray, FloatArray]:
        """Counts and edges of log10 of the magnitudes of the finite values that are not zero.

        Gradients spread over many decades and are a single spike on a linear axis; on this one they are a
        hill that can be seen to move.

        Returns:
            Counts, integers of shape (n,), and edges, float64 of shape (n + 1,), evenly spaced. Without such a
            value: no bucket, and one edge at 0.
        """
        if self.count == self.zero_count:
            return np.empty(0, np.int64), np.zeros(1)
        return log10_histograms(Knots.of(self.finite())).one(0)

    def finite(self) -> CodeCounts:
        """Codes and counts of the finite values, with their extremes: what histograms are made of."""
        if self.codes.size and not (self.nan_count or self.inf_count):
            return CodeCounts(self.codes, self.counts, self.low, self.high)
        wanted = (self.codes & 0x7FF) < INF_CODE
        return CodeCounts(self.codes[wanted], self.counts[wanted], self.low, self.high)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sketch):
            return NotImplemented
        return (
            np.array_equal(self.codes, other.codes)
            and np.array_equal(self.counts, other.counts)
            and self._moments() == other._moments()
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    def _moments(self) -> tuple[float, float, float, float]:
        return self.total, self.total_squares, self.low, self.high

    def __repr__(self) -> str:
        text = (
            f"Sketch(count={self.count}, mean={self.mean:.4g}, std={self.std:.4g}, min={self.min:.4g}, "
            f"max={self.max:.4g}, zero_fraction={self.zero_fraction:.3g}"
        )
        for name, number in (("nan_count", self.nan_count), ("inf_count", self.inf_count)):
            if number:
                text += f", {name}={number}"
        if self.histogram_share < 1:
            text += f", histogram_share={self.histogram_share:.3g}"
        return text + ")"


def merge_all(sketches: Iterable[Sketch]) -> Sketch:
    """Merge any number of sketches at once; of none, the empty sketch.

    Args:
        sketches: The sketches, in the order in which their sums are added.

    Returns:
        One sketch of all their values.
    """
    parts = list(sketches)
    if len(parts) == 1:
        return parts[0]
    dense = np.zeros(CODES, np.int64)
    count, total, squares, low, high, looked_at = 0, 0.0, 0.0, math.inf, -math.inf, 0.0
    for part in parts:
        looked_at += part.histogram_share * part.count
        dense[part.codes] += part.counts
        count += part.count
        total += part.total
        squares += part.total_squares
        low = min(low, part.low)
        high = max(high, part.high)
    merged = Sketch.from_dense(dense, (count, total, squares, low, high))
    return merged if looked_at == count else dataclasses.replace(merged, histogram_share=looked_at / count)


def _nonzero(counts: IntArray) -> npt.NDArray[np.intp]:
    """Where counts are not zero; by way of bool, which NumPy searches four times faster than integers."""
    return counts.astype(np.bool_).nonzero()[0]


def _float_info(dtype: torch.dtype) -> torch.finfo:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}, allowed is a floating-point type such as torch.float16")
    return torch.finfo(dtype)
