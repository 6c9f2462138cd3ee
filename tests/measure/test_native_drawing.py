"""Histograms made in C are those of NumPy: the same buckets, edges and counts, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from instrument import measure
from instrument.measure import native
from instrument.measure.columns import Sketches
from instrument.measure.histogram import Histograms, Knots, histograms, log10_histograms

pytestmark = pytest.mark.skipif(not native.is_there(), reason="the package was installed without a compiler")

EDGES = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.4e-39, 1.5e-39, -1.5e-39, 3.4028235e38, -3.4028235e38)
"""Zeros of both signs, what shares code 1 with what is too small for it, and the ends of float32."""


def assert_alike(found: Histograms, expected: Histograms) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tobytes() == np.asarray(theirs, mine.dtype).tobytes()


def assert_as_numpy(tensors: list[npt.NDArray[np.float32]]) -> None:
    sketches = Sketches.of([measure(torch.from_numpy(values)) for values in tensors]).finite()
    sketches = sketches.take(sketches.column("count").nonzero()[0])
    if not len(sketches):
        return
    knots = Knots(sketches.codes, sketches.counts, sketches.ends, sketches.column("low"), sketches.column("high"))
    found, numbers = native.histograms_of(sketches)
    assert_alike(found, histograms(knots))
    count, zeros, smallest = numbers.T
    assert count.tolist() == sketches.column("count").tolist() == knots.count.tolist()
    assert zeros.tolist() == sketches.column("zero_count").tolist()
    is_spread = (count > zeros).nonzero()[0]
    assert smallest[is_spread].tolist() == knots.smallest[is_spread].tolist()
    if is_spread.size:
        part = sketches.take(is_spread)
        knots = Knots(part.codes, part.counts, part.ends, part.column("low"), part.column("high"))
        assert_alike(native.log10_histograms_of(part, smallest[is_spread]), log10_histograms(knots))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        arrays.arrays(
            np.float32,
            st.integers(1, 40),
            elements=st.one_of(st.floats(width=32), st.sampled_from(EDGES), st.floats(-2, 2, width=32)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_tensors_beside_one_another(tensors: list[npt.NDArray[np.float32]]) -> None:
    """Any values, NaN and Inf among them, of several tensors: nobody's counts reach into the next one's."""
    assert_as_numpy(tensors)


@pytest.mark.parametrize("scale", [1e-38, 1e-5, 1.0, 1e30])
def test_many_tensors_of_many_values(scale: float) -> None:
    """Normal values by the thousand, shifted, of one sign, clipped at zero: as trainings have them."""
    generator = np.random.default_rng(7)
    normal = [generator.standard_normal(size).astype(np.float32) * np.float32(scale) for size in (3, 100, 5000)]
    shifted = [values + np.float32(3 * scale) for values in normal]
    assert_as_numpy([*normal, *shifted, *(-values for values in shifted), *(np.maximum(v, 0) for v in normal)])


def test_a_tensor_of_one_value() -> None:
    """Of zeros alone, of one value alone, of either sign: one bucket, at the value."""
    tensors = [np.full(5, value, np.float32) for value in EDGES]
    assert_as_numpy(tensors)
    found, _ = native.histograms_of(Sketches.of([measure(torch.full((5,), -2.0))]))
    assert (found.counts.tolist(), found.limits.tolist(), found.first.tolist()) == ([5.0], [-2.0], [-2.0])
