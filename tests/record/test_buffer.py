"""The buffer gives each record what belongs to its own tags, whoever comes late and whatever was noted before."""

from __future__ import annotations

import torch

from instrument.capture.names import Site
from instrument.measure.batch import measure_later
from instrument.record.buffer import Buffer, StepRecord

FIRST, LATE = Site("parameters", "first"), Site("parameters", "late")


def close(buffer: Buffer, step: int, *sites: Site, dtype: torch.dtype = torch.float32) -> StepRecord:
    """A record of a step with these sites."""
    buffer.open(step)
    tensors = [torch.ones(3, dtype=dtype) for _ in sites]
    for site, tensor in zip(sites, tensors, strict=True):
        buffer.note(site, tensor)
    buffer.add_column(sites, measure_later(tensors))
    record = buffer.close()
    assert record is not None
    return record


def test_a_record_has_the_traits_of_its_tags_and_of_no_others() -> None:
    """After a second optimizer's part has joined its step, a record of those tags alone has their traits alone."""
    buffer = Buffer(4)
    close(buffer, 0, FIRST)
    late = close(buffer, 0, LATE)
    assert list(late.traits) == list(late) == ["Parameters/late"]
    joined = buffer.history[-1]
    assert sorted(joined.traits) == sorted(joined) == ["Parameters/first", "Parameters/late"]
    alone = close(buffer, 1, LATE)
    assert list(alone.traits) == list(alone) == ["Parameters/late"]


def test_traits_are_shared_while_nothing_is_new_and_renewed_when_something_is() -> None:
    """Records of equal steps share one mapping; a tensor of another type, or other tags, bring another."""
    buffer = Buffer(4)
    one, two = close(buffer, 0, FIRST, LATE), close(buffer, 1, FIRST, LATE)
    assert one.traits is two.traits
    half = close(buffer, 2, FIRST, LATE, dtype=torch.float16)
    assert {found.dtype for found in half.traits.values()} == {torch.float16}
    assert list(close(buffer, 3, LATE, dtype=torch.float16).traits) == ["Parameters/late"]


def test_many_tensors_are_noted_as_one_by_one() -> None:
    """Whatever changes between two looks at many is noted: type, dimensions, wish for a gradient, what came alone."""
    buffer, sites = Buffer(4), [FIRST, LATE]
    tensors = [torch.ones(3), torch.ones(3)]
    for first in (
        torch.ones(3), torch.ones(3, requires_grad=True), torch.ones(3), torch.ones(1, 3), torch.ones(3).half(),
    ):  # fmt: skip
        tensors[0] = first
        for _ in range(2):
            buffer.note_all([*sites], [*tensors])
            assert buffer.traits[FIRST] == (first.dtype, first.ndim, first.requires_grad, 1.0)
            assert buffer.traits[LATE] == (torch.float32, 1, False, 1.0)
    buffer.note(FIRST, torch.ones(2, 2))
    buffer.note_all([*sites], [*tensors])
    assert buffer.traits[FIRST].ndim == 1
    buffer.divide(LATE, 8.0)
    buffer.note_all([*sites], [*tensors])
    assert buffer.traits[LATE].scale == 1.0
    buffer.note_all([], [])


def test_a_site_that_is_discarded_or_comes_twice_leaves_the_others_in_place() -> None:
    """Places in a column are those of its own tensors, whatever becomes of their neighbours."""
    buffer, third = Buffer(4), Site("parameters", "third")
    buffer.open(0)
    tensors = [torch.full((2,), float(value)) for value in range(3)]
    buffer.add_column([FIRST, LATE, third], measure_later(tensors))
    buffer.discard(FIRST)
    buffer.add_column([LATE, FIRST], measure_later([torch.full((2,), 5.0), torch.full((2,), 7.0)]))
    record = buffer.close()
    assert record is not None
    assert {tag: (sketch.mean, sketch.count) for tag, sketch in record.items()} == {
        "Parameters/late": (3.0, 4), "Parameters/third": (2.0, 2), "Parameters/first": (7.0, 2)
    }  # fmt: skip


def test_what_could_not_be_measured_leaves_its_neighbours_in_place() -> None:
    """One tensor without values among others is absent, and each of the others has its own sketch."""
    buffer, third = Buffer(4), Site("parameters", "third")
    buffer.open(0)
    column = measure_later([torch.full((2,), 1.0), torch.ones(2, device="meta"), torch.full((2,), 3.0)])
    assert [place for place, _ in column.failures()] == [1]
    buffer.add_column([FIRST, LATE, third], column)
    record = buffer.close()
    assert record is not None
    assert [sketch.mean for sketch in record.columns()] == [1.0, 3.0]
    assert {tag: sketch.mean for tag, sketch in record.items()} == {"Parameters/first": 1.0, "Parameters/third": 3.0}
