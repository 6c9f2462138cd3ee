"""The numbers of a live step: those that the sketches give one by one, whoever asks and however."""

from __future__ import annotations

import math

import pytest
import torch

from instrument import measure
from instrument.diagnose.readings import GLOBAL_L2, Reading
from instrument.record.buffer import StepRecord
from instrument.record.tags import COUNTS, STATISTICS, Tag, parse_tag

NAN, INF = float("nan"), float("inf")
TENSORS = {
    "Activations/a": torch.tensor([1.0, -2.0, 0.0]),
    "Activations/b": torch.tensor([NAN, NAN]),
    "Activations/c": torch.tensor([NAN, 3.0, INF]),
    "Gradients/a.weight": torch.tensor([[3.0, 4.0]]),
    "Gradients/empty": torch.empty(0),
    "Parameters/a.weight": torch.tensor([[1.0, 1.0]]),
}


@pytest.fixture
def record() -> StepRecord:
    """A record in which some is NaN, some Inf, and some empty."""
    return StepRecord(5, {tag: measure(tensor) for tag, tensor in TENSORS.items()}, 0.0)


def expected(record: StepRecord) -> dict[Tag, float]:
    """Statistic by statistic, from the properties of each sketch."""
    found = {}
    for tag, sketch in record.items():
        site = parse_tag(tag)
        assert site is not None
        if sketch.count:
            found.update({Tag(site.kind, name, site.name): get(sketch) for name, get in STATISTICS.items()})
        for name, get in COUNTS.items():
            if get(sketch) or not sketch.count:
                found[Tag(site.kind, name, site.name)] = float(get(sketch))
    found[GLOBAL_L2] = 5.0
    return found


def test_every_number_is_there_in_the_order_of_execution(record: StepRecord) -> None:
    """As items, by tag and by length the numbers are those of the sketches; counts of zero are left out."""
    values = Reading.of_record(record).values
    truth = expected(record)
    assert list(values) == list(truth)
    assert dict(values.items()) == pytest.approx(truth)
    assert {tag: values[tag] for tag in truth} == pytest.approx(truth)
    assert len(values) == len(truth)
    assert values == pytest.approx(truth)
    for absent in (Tag("gradients", "nan_count", "a.weight"), Tag("updates", "rms", "x"), Tag("gradients", "rms", "x")):
        assert absent not in values
        assert values.get(absent) is None


def test_columns_are_the_numbers_of_one_statistic(record: StepRecord) -> None:
    """Each column, whole or with gaps, has what its tags have, and nothing where there is none."""
    reading = Reading.of_record(record)
    truth = expected(record)
    for kind in ("activations", "gradients", "parameters", "updates"):
        for statistic in (*STATISTICS, *COUNTS, "l2"):
            column = reading.column(kind, statistic)
            of_kind = {tag.name: value for tag, value in truth.items() if tag[:2] == (kind, statistic)}
            assert dict(column.items()) == pytest.approx(of_kind)
            assert [*column] == [*of_kind]
            assert [column.get(name) for name in of_kind] == pytest.approx([*of_kind.values()])
            assert (column.get("nobody"), column.get("nobody", 1.5), "nobody" in column) == (None, 1.5, False)
            assert len(column) == len(of_kind)
            if statistic in STATISTICS:
                names = (*reversed(of_kind), "nobody")
                assert reading.sizes(kind, statistic, names).tolist() == [column.get(name, 0.0) for name in names]
    scalars = Reading.of_scalars(0, truth)
    assert scalars.sizes("gradients", "rms", ("nobody", "a.weight")).tolist() == [
        0.0,
        truth[Tag("gradients", "rms", "a.weight")],
    ]
    assert (reading.is_finite, scalars.is_finite) == (False, False)
    assert Reading.of_scalars(0, {Tag("gradients", "rms", "a"): 1.0, Tag("gradients", "nan_count", "a"): 0.0}).is_finite
    assert reading.with_gradient == scalars.with_gradient == frozenset({"a.weight"})
    assert reading.get("activations", "nan_count", "c") == 1.0
    assert reading.derived() == {GLOBAL_L2: 5.0}
    assert [site.name for site in reading.sites] == ["a", "b", "c", "a.weight", "empty", "a.weight"]
    assert not math.isnan(sum(reading.values.values()))
