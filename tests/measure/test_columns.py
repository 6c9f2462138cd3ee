"""Sketches as columns: however they are joined, cut and picked, each is the one that was measured."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.measure.batch import measure_later
from instrument.measure.columns import Sketches
from instrument.measure.custom_op import measure
from instrument.measure.pending import gathered
from instrument.measure.sketch import Sketch

VALUES = st.lists(st.one_of(st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-45]), st.floats(width=32)))
TENSORS = st.lists(VALUES, max_size=7)


def assert_same(found: Sketch, expected: Sketch) -> None:
    for field in dataclasses.fields(Sketch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist(), field.name
        else:
            assert type(one) is type(other), field.name
            np.testing.assert_equal(one, other, field.name)


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.data())
def test_columns_hold_each_sketch(values: list[list[float]], data: st.DataObject) -> None:
    """Whole, cut, picked from and joined again, every field of every sketch is what it was."""
    sketches = [measure(torch.tensor(each, dtype=torch.float32)) for each in values]
    columns = Sketches.of(sketches)
    cut = data.draw(st.integers(0, len(sketches)))
    places = sorted(data.draw(st.sets(st.sampled_from(range(len(sketches))))) if sketches else ())
    joined = Sketches.joined([columns.part(0, cut), columns.part(cut, len(sketches))])
    for found, expected in ((columns, sketches), (joined, sketches), (columns.take(np.array(places, np.int64)), None)):
        wanted = expected if expected is not None else [sketches[place] for place in places]
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    for one, other in zip(columns.finite(), sketches, strict=True):
        assert one.codes.tolist() == other.finite().codes.tolist()
        assert one.counts.tolist() == other.finite().counts.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_what_was_measured_together_and_alone_is_gathered_in_order(seed: int) -> None:
    """Small tensors of two types that wait for others, large ones and made sketches, in any order, a NaN among them."""
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    tensors = [torch.randn(order.choice((1, 300, 20_000)), generator=generator) for _ in range(40)]
    tensors = [tensor.to(order.choice((torch.float32, torch.bfloat16))) for tensor in tensors]
    tensors[order.randrange(40)][0] = float("nan")
    places = list(range(40))
    if seed:
        order.shuffle(places)
    later = measure_later(tensors)
    items = [later[place] if order.random() < 0.8 else measure(tensors[place]) for place in places]
    found = gathered([item for item in items if not isinstance(item, Exception)])
    assert len(found) == 40
    for sketch, place in zip(found, places, strict=True):
        expected = measure(tensors[place])
        assert (sketch.codes.tolist(), sketch.counts.tolist()) == (expected.codes.tolist(), expected.counts.tolist())
        assert (sketch.count, sketch.low, sketch.high) == (expected.count, expected.low, expected.high)
        assert (sketch.nan_count, sketch.zero_count) == (expected.nan_count, expected.zero_count)
