"""Events that we pack ourselves, against what protobuf's own classes make of the same numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from instrument.measure.batch import measure_many
from instrument.measure.sketch import Sketch
from instrument.record.buffer import StepRecord
from instrument.record.statistics import SLICE
from instrument.record.tags import STATISTICS
from instrument.record.values import histogram_slices, scalar_values
from instrument.record.wire import ScalarLayout, event_parts, histogram_values
from instrument.record.writer import sink_for

pytestmark = pytest.mark.usefixtures("engine")

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


class Recorder:
    """A user's writer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[Summary.Value] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.values.append(Summary.Value(tag=tag, simple_value=value))

    def add_histogram_raw(self, tag: str, **fields: Any) -> None:
        fields.pop("global_step")
        limits, counts = fields.pop("bucket_limits"), fields.pop("bucket_counts")
        self.values.append(Summary.Value(tag=tag, histo=HistogramProto(bucket_limit=limits, bucket=counts, **fields)))


def record_of(tensors: list[torch.Tensor], section: str, step: int = 7) -> StepRecord:
    sketches = [found for found in measure_many(tensors) if isinstance(found, Sketch)]
    assert len(sketches) == len(tensors)
    return StepRecord(step, {f"{section}/блок.{i}": sketch for i, sketch in enumerate(sketches)}, 123.5)


def packed(record: StepRecord) -> Event:
    tags, numbers = scalar_values(record, set())
    parts = [ScalarLayout(tags).values(numbers), *map(histogram_values, histogram_slices(record))]
    return Event.FromString(b"".join(map(bytes, event_parts(record.wall_time, record.step, parts))))


@pytest.mark.parametrize("section", ["Parameters", "Gradients"])
@pytest.mark.parametrize("count", [1, SLICE, 2 * SLICE + 3])
def test_an_event_is_what_protobuf_makes_of_what_a_users_writer_is_given(section: str, count: int) -> None:
    """Parsed by protobuf, an event has the tags, scalars and histograms that a user's writer is called with."""
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(1 + 7 * (i % 90), generator=generator) * 10.0 ** (i % 30 - 15) for i in range(count)]
    tensors[0] = torch.tensor([0.0, math.nan, math.inf, -2.0, 3.0])
    record = record_of(tensors, section)
    writer = Recorder()
    sink = sink_for(writer)
    sink.write(record, scalars=True, histograms=True)
    sink.close()
    expected = Event(wall_time=123.5, step=7, summary=Summary(value=writer.values))
    assert packed(record) == expected
    assert len(expected.summary.value) >= 6 * count


def test_histograms_of_a_slice_are_those_of_each_sketch() -> None:
    """Worked out together, edges and counts are those that each sketch gives by itself."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(300, generator=generator) * 10.0 ** (i % 20 - 10) for i in range(SLICE + 9)]
    tensors += [torch.zeros(3), torch.full((4,), -2.5), torch.tensor([1e-45, 0.0]), torch.relu(torch.randn(50))]
    record = record_of(tensors, "Gradients")
    values = {value.tag: value.histo for value in packed(record).summary.value if value.HasField("histo")}
    for tag, sketch in record.items():
        counts, edges = sketch.histogram()
        found = values[tag]
        assert list(found.bucket) == counts.tolist()
        assert [found.min, *found.bucket_limit] == edges.tolist()
        assert (found.num, found.sum, found.sum_squares) == (sketch.count, sketch.total, sketch.total_squares)
        assert found.max == sketch.max
        counts, edges = sketch.log10_histogram()
        log10 = values.get(tag.replace("/", ".log10/"))
        assert (log10 is None) == (counts.size == 0)
        if log10 is not None:
            assert list(log10.bucket) == counts.tolist()
            assert [log10.min, *log10.bucket_limit] == edges.tolist()
            assert log10.num == counts.sum()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=200), NUMBERS, NUMBERS), max_size=20))
def test_scalars_are_packed_as_protobuf_packs_them(rows: list[tuple[str, float, float]]) -> None:
    """Any tags and any numbers, NaN and what no float32 holds among them, are the bytes that protobuf writes."""
    layout = ScalarLayout([tag for tag, _, _ in rows])
    for column in (1, 2, 1):  # the layout is used again with other numbers
        numbers = [row[column] for row in rows]
        values = [Summary.Value(tag=row[0], simple_value=row[column]) for row in rows]
        expected = Summary.FromString(Summary(value=values).SerializeToString())
        found = Summary.FromString(bytes(layout.values(np.array(numbers))))
        assert [value.tag for value in found.value] == [value.tag for value in expected.value]
        assert [repr(v.simple_value) for v in found.value] == [repr(v.simple_value) for v in expected.value]
        assert all(value.HasField("simple_value") for value in found.value)


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 2**31, 2**62])
def test_steps_of_any_size_are_packed(step: int) -> None:
    """An event's step is what protobuf reads back, however many bytes it takes."""
    found = Event.FromString(b"".join(map(bytes, event_parts(0.25, step, []))))
    assert (found.step, found.wall_time) == (step, 0.25)


def test_counts_of_nan_appear_once_they_were_above_zero_and_then_stay() -> None:
    """A count of NaN is absent while there was none, and falls back to zero visibly afterwards."""
    counted: set[str] = set()
    whole, broken = torch.ones(3), torch.tensor([1.0, math.nan])
    found = []
    for tensor in (whole, broken, whole):
        tags, numbers = scalar_values(record_of([tensor], "Gradients"), counted)
        found.append({tag: number for tag, number in zip(tags, numbers.tolist(), strict=True) if "count" in tag})
    assert found == [{}, {"Gradients.nan_count/блок.0": 1.0}, {"Gradients.nan_count/блок.0": 0.0}]
    tags, _ = scalar_values(record_of([whole], "Gradients"), set())
    assert [*tags] == [f"Gradients.{statistic}/блок.0" for statistic in STATISTICS]
