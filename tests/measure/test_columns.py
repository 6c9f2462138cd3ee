"""Sketches as columns: however they are joined, cut and picked, each is the one that was measured."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.capture.names import Site
from instrument.measure.batch import Batch, measure_later
from instrument.measure.columns import Sketches
from instrument.measure.custom_op import measure
from instrument.measure.pending import PLACES, gathered
from instrument.measure.sketch import Sketch
from instrument.record.buffer import Buffer, StepRecord

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


def test_a_step_is_gathered_from_places_objects_and_merged_parts() -> None:
    """Small and large tensors, tensors that came alone and sites that came twice, in the order of the sites.

    Whether all are asked for together, one by one, or as what will give them.
    """
    generator = torch.Generator().manual_seed(3)
    sizes = (5, 20_000, 7, 300, 9000, 64)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[3] = tensors[3].bfloat16()
    twice = torch.randn(11, generator=generator)

    def record() -> StepRecord:
        buffer, batch = Buffer(2), Batch()
        buffer.open(4)
        buffer.add(Site("activations", "own"), *batch.put(twice))
        buffer.add_column([Site("gradients", str(number)) for number in range(6)], measure_later(tensors))
        buffer.add_column([Site("parameters", str(number)) for number in range(3)], measure_later(tensors[:3]))
        buffer.add(Site("gradients", "2"), *batch.put(twice))
        buffer.add_column([Site("gradients", "0"), Site("updates", "0")], measure_later([twice, twice]))
        closed = buffer.close()
        assert closed is not None
        return closed

    merged = {"Gradients/0": tensors[0], "Gradients/2": tensors[2]}
    parts: dict[str, list[torch.Tensor]] = {"Activations/own": [twice]}
    parts |= {f"Gradients/{number}": [tensor] for number, tensor in enumerate(tensors)}
    parts |= {tag: [tensor, twice] for tag, tensor in merged.items()}
    parts |= {f"Parameters/{number}": [tensors[number]] for number in range(3)} | {"Updates/0": [twice]}
    alone, together, loose = record(), record(), record()
    assert list(alone) == list(together) == list(parts)
    columns = list(together.columns())
    given = StepRecord(4, loose._sketches.as_they_are(), 0.0)
    for place, (tag, values) in enumerate(parts.items()):
        expected = measure(values[0]).merge(*map(measure, values[1:]))
        for found in (alone[tag], columns[place], together[tag], given[tag]):
            assert found.codes.tolist() == expected.codes.tolist(), tag
            assert found.counts.tolist() == expected.counts.tolist()
            assert (found.count, found.low, found.high) == (expected.count, expected.low, expected.high)


def test_a_source_is_asked_once_whatever_stands_beside_its_places() -> None:
    """One sketch that is in no source does not have the sources make all of theirs for each place anew."""

    class Counting:
        def __init__(self, values: list[float]) -> None:
            self.asked = 0
            self.values = values

        def sketches(self) -> Sketches:
            self.asked += 1
            return Sketches.of([measure(torch.tensor([value])) for value in self.values])

        def item(self, place: int) -> Sketch:
            return self.sketches()[place]

        @property
        def held(self) -> int:
            return 0

    sources = [Counting([1.0, 2.0]), Counting([3.0])]
    found = gathered([1, PLACES, measure(torch.tensor([9.0])), 0], sources)
    assert [sketch.mean for sketch in found] == [2.0, 3.0, 9.0, 1.0]
    assert [source.asked for source in sources] == [1, 1]
