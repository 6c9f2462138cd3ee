"""The sketch against float64 NumPy over all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import instrument
from instrument.errors import ConfigError
from instrument.measure.custom_op import measure
from instrument.measure.sketch import Sketch, merge_all

from .twin import assert_measures

pytestmark = pytest.mark.usefixtures("engine")

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
DOUBLES = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(FLOATS, max_size=60))
def test_any_float32_values_measure_as_numpy_says(values: list[float]) -> None:
    """Any float32 values, NaN, Inf, zeros of both signs and subnormals among them, measure as NumPy says."""
    array = np.array(values, dtype=np.float32)
    assert_measures(measure(torch.from_numpy(array)), array)


@settings(max_examples=300, deadline=None)
@given(st.lists(DOUBLES, max_size=60))
def test_any_float64_values_measure_as_numpy_says(values: list[float]) -> None:
    """Any float64 values measure as NumPy says, also those that float32 would turn to zero or Inf."""
    array = np.array(values, dtype=np.float64)
    assert_measures(measure(torch.from_numpy(array)), array)


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS, max_size=50), st.lists(st.integers(0, 50), max_size=4))
def test_merging_equals_measuring_the_concatenation(values: list[float], cuts: list[int]) -> None:
    """However the values are split, merging the parts gives the codes, counts and extremes of the whole."""
    array = np.array(values, dtype=np.float32)
    parts = np.split(array, sorted(min(cut, len(array)) for cut in cuts))
    merged = merge_all([measure(torch.from_numpy(part.copy())) for part in parts])
    whole = measure(torch.from_numpy(array))
    assert merged.codes.tolist() == whole.codes.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    assert (merged.low, merged.high) == (whole.low, whole.high)
    assert_measures(merged, array)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(FLOATS, max_size=8), min_size=3, max_size=3))
def test_merging_is_associative_commutative_and_has_a_neutral_element(lists: list[list[float]]) -> None:
    """Merging gives the same whatever the order and grouping, and merging with nothing changes nothing."""
    a, b, c = (measure(torch.tensor(values)) for values in lists)
    for other in (a.merge(b.merge(c)), c.merge(b, a), a.merge(b, c, Sketch.empty())):
        one = a.merge(b).merge(c)
        assert one.codes.tolist() == other.codes.tolist()
        assert one.counts.tolist() == other.counts.tolist()
        assert (one.low, one.high) == (other.low, other.high)
        assert one.total == pytest.approx(other.total, rel=1e-9, abs=1e-6 * one.l2)
    assert a.merge(Sketch.empty()) == a


@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 131_072, 131_073, 400_000])
def test_sizes_around_the_edges_of_a_block(size: int) -> None:
    """Sizes at and around the limits of pieces and blocks lose no element and count none twice."""
    values = torch.randn(size) * 3
    values[::7] = 0.0
    values[-1] = math.nan
    assert_measures(measure(values), values.numpy())


def test_statistics_of_a_gaussian_are_those_of_theory() -> None:
    """A million samples of a normal distribution have its quantiles, its rms and its mean magnitude."""
    sketch = measure(torch.randn(1_000_000, generator=torch.Generator().manual_seed(1)))
    assert sketch.rms == pytest.approx(1.0, abs=0.005)
    for q, place in ((0.0228, -2.0), (0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0), (0.9987, 3.0)):
        assert sketch.quantile(q) == pytest.approx(place, rel=0.015, abs=0.015)


def test_variance_far_from_zero_keeps_its_digits() -> None:
    """N(10000, 1) has standard deviation 1: the squares are not summed in float32."""
    values = torch.randn(500_000, generator=torch.Generator().manual_seed(2)) + 1e4
    assert measure(values).std == pytest.approx(values.numpy().astype(np.float64).std(), rel=1e-6)


def test_squares_beyond_float32_are_summed() -> None:
    """Values of 1e30, whose squares no float32 holds, have an exact norm."""
    assert measure(torch.full((4,), 1e30)).l2 == pytest.approx(2e30, rel=1e-7)


def test_a_constant_has_no_deviation_and_one_bucket() -> None:
    """A constant tensor has a deviation of exactly zero and one bucket of width zero."""
    sketch = measure(torch.full((1000,), 0.1))
    assert sketch.std == 0.0
    counts, edges = sketch.histogram()
    assert counts.tolist() == [1000]
    assert edges[0] == edges[1] == np.float32(0.1)


def test_zeros_have_a_bucket_of_their_own_in_the_histogram() -> None:
    """Exact zeros fill a bucket of width zero, apart from the small values beside it."""
    values = torch.cat((torch.zeros(700), torch.randn(300) * 1e-4))
    counts, edges = measure(values).histogram()
    widths = np.diff(edges)
    (zero_bucket,) = np.flatnonzero((widths == 0) & (edges[:-1] == 0))
    assert counts[zero_bucket] == 700


@pytest.mark.parametrize("shape", ["normal", "relu", "student", "lognormal"])
def test_quantile_lines_of_the_histogram_are_those_of_the_values(shape: str) -> None:
    """The nine lines that TensorBoard draws are off by less than 1.5 % of the spread from 1 % to 99 %."""
    rng = np.random.default_rng(3)
    raw = {
        "normal": rng.normal(size=100_000),
        "relu": np.maximum(rng.normal(size=100_000), 0),
        "student": rng.standard_t(2, size=100_000),
        "lognormal": rng.lognormal(-6, 2, size=100_000) * rng.choice([-1, 1], size=100_000),
    }[shape].astype(np.float32)
    counts, edges = measure(torch.from_numpy(raw)).histogram()
    lines = np.array([0.0, 0.0668, 0.1587, 0.3085, 0.5, 0.6915, 0.8413, 0.9332, 1.0])
    below = np.concatenate(([0], np.cumsum(counts))) / raw.size
    drawn = np.interp(lines, below, edges)
    low, high = np.quantile(raw, [0.01, 0.99])
    assert np.abs(drawn - np.quantile(raw, lines)).max() < 0.015 * (high - low)


def test_log10_histogram_counts_magnitudes() -> None:
    """The histogram of log10|x| leaves zeros out and has the decades of the values at its ends."""
    values = torch.tensor([1e-6, -1e-3, 0.0, 1e-3, 1.0])
    counts, edges = measure(values).log10_histogram()
    assert counts.sum() == 4
    assert edges[0] == pytest.approx(-6, abs=0.06)
    assert edges[-1] == pytest.approx(0.0, abs=1e-9)
    assert counts[(edges[:-1] >= -3.1) & (edges[1:] <= -2.8)].sum() == 2
    assert measure(torch.zeros(3)).log10_histogram()[0].size == 0


@pytest.mark.parametrize(
    ("dtype", "rounds_out_of_range"),
    [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38), (torch.float8_e4m3fn, 464.0), (torch.float8_e5m2, 61440.0)],
)
def test_underflow_and_overflow_agree_with_a_real_conversion(dtype: torch.dtype, rounds_out_of_range: float) -> None:
    """The share that becomes zero agrees with converting the values, the share beyond with its limit."""
    exponents = torch.rand(200_000, generator=torch.Generator().manual_seed(4)) * 80 - 40
    values = torch.exp2(exponents)
    sketch = measure(values)
    zero = (values.to(dtype).float() == 0).float().mean().item()
    assert sketch.underflow_fraction(dtype) == pytest.approx(zero, abs=2e-3)
    beyond = (values >= rounds_out_of_range).float().mean().item()
    assert sketch.overflow_fraction(dtype) == pytest.approx(beyond, abs=2e-3)


def test_underflow_is_a_share_of_what_is_not_zero() -> None:
    """Zeros cannot underflow: three zeros beside one tiny and one ordinary value leave a share of a half."""
    assert measure(torch.tensor([0.0, 0.0, 0.0, 1e-12, 1.0])).underflow_fraction(torch.float16) == 0.5


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, "0.5", None])
def test_a_quantile_that_is_no_share_is_refused(q: object) -> None:
    """A q outside 0..1 is refused with what is allowed."""
    with pytest.raises(ConfigError, match="allowed is a share from 0 to 1"):
        measure(torch.ones(1)).quantile(q)  # type: ignore[arg-type]


def test_a_type_that_is_no_float_is_refused() -> None:
    """Underflow in an integer type is a mistake that is told."""
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        measure(torch.ones(1)).underflow_fraction(torch.int8)


def test_measure_is_public() -> None:
    """`instrument.measure` is this function."""
    assert instrument.measure is measure
