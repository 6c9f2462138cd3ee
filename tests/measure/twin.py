"""Independent truth for sketches: plain float64 NumPy over all values at once, sharing no code with the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from instrument.measure.sketch import Sketch


def assert_measures(sketch: Sketch, values: npt.NDArray[Any]) -> None:
    """Every statistic of the sketch equals that of the values; counts and extremes to the last digit."""
    values = values.astype(np.float64).ravel()
    finite = values[np.isfinite(values)]
    assert sketch.count == finite.size
    assert sketch.nan_count == np.isnan(values).sum()
    assert sketch.inf_count == np.isinf(values).sum()
    if not finite.size:
        assert np.isnan([sketch.mean, sketch.std, sketch.rms, sketch.min, sketch.max, sketch.abs_max]).all()
        assert np.isnan([sketch.zero_fraction, sketch.quantile(0.5)]).all()
        assert sketch.l2 == 0.0
        return
    scale = np.abs(finite).max()
    with np.errstate(all="ignore"):
        assert sketch.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-12 * scale)
        assert sketch.rms == pytest.approx(np.sqrt(np.mean(finite**2)), rel=1e-9)
        assert sketch.l2 == pytest.approx(np.sqrt(np.sum(finite**2)), rel=1e-9)
        if finite.min() == finite.max():
            assert sketch.std == 0.0
        elif np.isinf(np.sum(finite**2)):
            assert np.isinf(sketch.std)
        else:
            assert sketch.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-7 * scale)
    assert sketch.min == finite.min()
    assert sketch.max == finite.max()
    assert sketch.abs_max == scale
    assert sketch.zero_fraction == pytest.approx((finite == 0).mean(), abs=1e-15)
    assert sketch.quantile(0.0) == finite.min()
    assert sketch.quantile(1.0) == finite.max()
    counts, edges = sketch.histogram()
    assert counts.sum() == finite.size
    assert (counts >= 0).all()
    assert len(edges) == len(counts) + 1 <= 66
    assert edges[0] == finite.min()
    assert edges[-1] == finite.max()
    assert (np.diff(edges) >= 0).all()
