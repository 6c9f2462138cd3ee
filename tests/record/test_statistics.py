"""Statistics of many sketches at once are those that each sketch gives of itself."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.measure.columns import Sketches
from instrument.measure.custom_op import measure
from instrument.record.buffer import StepRecord
from instrument.record.statistics import COLUMNS, SLICE, statistics_of
from instrument.record.tags import COUNTS, STATISTICS

SPECIAL = [0.0, -0.0, 1.0, -3.5, 5e-324, 1e300, -1e300, math.nan, math.inf, -math.inf]
TENSORS = st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(allow_nan=False)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.lists(TENSORS, max_size=5))
def test_columns_are_the_properties(tensors: list[list[float]]) -> None:
    """Each number is what the property of the sketch says, to the last bits; NaN where it has no finite value."""
    sketches = [measure(torch.tensor(values, dtype=torch.float64)) for values in tensors]
    table = statistics_of(Sketches.of(sketches))
    assert table.shape == (len(sketches), len(COLUMNS))
    for sketch, row in zip(sketches, table, strict=True):
        for number, (name, compute) in zip(row, {**STATISTICS, **COUNTS}.items(), strict=True):
            np.testing.assert_allclose(number, compute(sketch), rtol=1e-15, equal_nan=True, err_msg=name)


def test_a_record_works_them_out_once_for_any_number_of_sketches() -> None:
    """More sketches than fit a slice come in the order of the record, and the second call gives the same array."""
    sketches = {f"Gradients/{number}": measure(torch.full((2,), float(number))) for number in range(2 * SLICE + 3)}
    record = StepRecord(0, sketches, 0.0)
    table = record.statistics()
    assert table[:, COLUMNS.index("mean")].tolist() == list(range(2 * SLICE + 3))
    assert record.statistics() is table
    assert StepRecord(0, {}, 0.0).statistics().shape == (0, len(COLUMNS))
