"""What changed between copies of many small tensors, against each change measured by itself in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument import measure
from instrument.measure.changes import measure_changes
from instrument.measure.sketch import Sketch

pytestmark = pytest.mark.usefixtures("engine")

ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, 3e-39, 3e38, -3e38, 1e-3, math.inf, -math.inf, math.nan]


def assert_same(found: Sketch, alone: Sketch, size: float) -> None:
    """Equal, but for the order in which values of this size in all are added up."""
    for field in dataclasses.fields(Sketch):
        one, other = getattr(found, field.name), getattr(alone, field.name)
        if isinstance(one, np.ndarray):
            assert one.tolist() == other.tolist(), field.name
        else:
            assert one == pytest.approx(other, rel=1e-14, abs=1e-15 * size if field.name == "total" else 0.0), (
                field.name
            )


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_changes_are_those_measured_one_by_one(data: st.DataObject, dtype: torch.dtype) -> None:
    """Whatever the values: NaN, infinities, what no float32 holds, subnormal numbers, and zeros of either sign."""
    value = st.one_of(st.sampled_from(ODD), st.floats(-10, 10, width=32))
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    before, after = (
        torch.tensor(data.draw(st.lists(value, min_size=sum(sizes), max_size=sum(sizes)))).to(dtype) for _ in range(2)
    )
    column = measure_changes(before.clone(), after.clone(), sizes)
    assert len(column) == len(sizes)
    changes = (after.double() - before.double()).split(sizes)
    for item, change in zip(column, changes, strict=True):
        assert not isinstance(item, (Sketch, Exception))
        assert_same(item.sketch(), measure(change), float(change[change.isfinite()].abs().sum()))


def test_a_thousand_changes_take_several_groups() -> None:
    """Each has its own sketch, in their order, however they are cut."""
    sizes = [1 + number % 700 for number in range(1500)]
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(sum(sizes), generator=generator) for _ in range(2))
    column = measure_changes(before, after, sizes)
    assert len(column.groups) > 1
    for item, change in zip(column, (after.double() - before.double()).split(sizes), strict=True):
        assert not isinstance(item, (Sketch, Exception))
        assert item.sketch().total == pytest.approx(float(change.sum()), rel=1e-12, abs=1e-12)
        assert item.sketch().max == float(change.max())
