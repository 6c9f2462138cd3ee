"""Merging over ranks, with threads for ranks: equal to merging the sketches in one place."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.capture.names import Site
from instrument.errors import RanksError
from instrument.measure.custom_op import measure
from instrument.measure.sketch import Sketch, merge_all
from instrument.measure.slopes import slopes_named
from instrument.measure.units import UnitTally, merge_tallies, tally_rows, tally_units
from instrument.record.buffer import StepRecord
from instrument.record.ranks.group import Position, RankGroup
from instrument.record.ranks.merging import RecordMerger

TIMEOUT_SECONDS = 30


class Table:
    """Where the threads of a fake process group put their vectors."""

    def __init__(self, world: int) -> None:
        self.slots: list[Any] = [None] * world
        self.barrier = threading.Barrier(world)
        self.calls = 0


class FakeGroup:
    """`allreduce` and `allgather` as gloo has them, between threads."""

    def __init__(self, table: Table, rank: int) -> None:
        self._table = table
        self._rank = rank

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._table.slots[self._rank] = tensor.clone()
        self._table.barrier.wait(TIMEOUT_SECONDS)
        found = [slot.clone() for slot in self._table.slots]
        assert len({slot.shape for slot in found}) == 1, "ranks must send vectors of one shape"
        self._table.barrier.wait(TIMEOUT_SECONDS)
        return found

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        stacked = torch.stack(self._exchange(tensors[0]))
        is_sum = options.reduceOp == torch.distributed.ReduceOp.SUM
        tensors[0].copy_(stacked.sum(0) if is_sum else stacked.amax(0))
        return self

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Any:
        for output, found in zip(outputs[0], self._exchange(inputs[0]), strict=True):
            output.copy_(found)
        return self

    def wait(self) -> None:
        """Done already."""


def merge_in_threads(
    records: Sequence[Sequence[StepRecord]], counted: Sequence[dict[str, bool | None]]
) -> tuple[list[list[StepRecord]], list[int]]:
    """What each rank gets for each of its records, and how many reductions it made."""
    world = len(records)
    table = Table(world)
    results: list[list[StepRecord]] = [[] for _ in range(world)]
    groups = [RankGroup(Position(rank, world, True), FakeGroup(table, rank)) for rank in range(world)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        def is_counted(site: Site) -> bool | None:
            return counted[rank].get(site.name, True)

        merger = RecordMerger(groups[rank], is_counted)
        try:
            for record in records[rank]:
                results[rank].append(merger.merge(record))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    if errors:
        raise errors[0]
    return results, [group.reductions for group in groups]


SPECIAL = [0.0, -0.0, 1.0, -3.5, 1e-45, 3e38, float("nan"), float("inf"), -float("inf")]
TENSORS = st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False)), max_size=12)
RANKS = st.lists(st.dictionaries(st.sampled_from("abc"), TENSORS, max_size=3), min_size=2, max_size=4)


def record(step: int, tensors: dict[str, list[float]]) -> StepRecord:
    return StepRecord(
        step, {f"Activations/{name}": measure(torch.tensor(values)) for name, values in tensors.items()}, 0.0
    )


def assert_same(merged: Sketch, expected: Sketch) -> None:
    assert merged.codes.tolist() == expected.codes.tolist()
    assert merged.counts.tolist() == expected.counts.tolist()
    for field in ("count", "zero_count", "nan_count", "inf_count", "low", "high"):
        assert getattr(merged, field) == getattr(expected, field), field
    np.testing.assert_allclose(merged.total, expected.total, rtol=1e-12, atol=1e-12 * expected.l2)
    np.testing.assert_allclose(merged.total_squares, expected.total_squares, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(RANKS)
def test_merged_over_ranks_is_merged_in_one_place(ranks: list[dict[str, list[float]]]) -> None:
    """Whatever values each rank has, NaN, Inf, zeros and nothing included, the result is the sketch of all of them."""
    steps = [[record(step, tensors) for step in (0, 1)] for tensors in ranks]
    results, _ = merge_in_threads(steps, [{}] * len(ranks))
    tags = {tag for records in steps for tag in records[0]}
    for found in results:
        for step, merged in enumerate(found):
            assert merged.step == step
            assert set(merged) == tags
            for tag in tags:
                parts = [records[step][tag] for records in steps if tag in records[step]]
                assert_same(merged[tag], merge_all(parts))


UNITS = st.lists(st.dictionaries(st.sampled_from("xyz"), st.integers(0, 99), max_size=3), min_size=2, max_size=4)


def units_of(drawn: dict[str, int]) -> dict[str, UnitTally]:
    """For each name a tally of its own kind and size, of values that the number draws; NaN among them now and then."""
    found = {}
    for name, seed in drawn.items():
        z = torch.randn(1 + seed % 5, ord(name) - ord("u"), generator=torch.Generator().manual_seed(seed))
        z[0, 0] = math.nan if seed % 4 == 0 else z[0, 0]
        function = {"x": "relu", "y": "tanh", "z": None}[name]
        found[name] = tally_units(z, 1, slopes_named(function) if function else None)
    return {name: tally for name, tally in found.items() if isinstance(tally, UnitTally)}


@settings(max_examples=60, deadline=None)
@given(UNITS)
def test_units_merged_over_ranks_are_merged_in_one_place(ranks: list[dict[str, int]]) -> None:
    """Whatever units each rank has, the tallies are those of all samples; late ones join."""
    steps = [
        [StepRecord(step, {}, 0.0, units=units_of(drawn if step else {})) for step in (0, 1, 2)] for drawn in ranks
    ]
    results, _ = merge_in_threads(steps, [{}] * len(ranks))
    expected: dict[str, list[UnitTally]] = {}
    for drawn in ranks:
        for name, part in units_of(drawn).items():
            expected.setdefault(name, []).append(part)
    for found in results:
        assert [set(merged.units) for merged in found] == [set(), set(expected), set(expected)]
        for merged in found[1:]:
            for name, parts in expected.items():
                whole = merge_tallies(parts)
                for field in dataclasses.fields(UnitTally):
                    got, wanted = getattr(merged.units[name], field.name), getattr(whole, field.name)
                    if isinstance(wanted, np.ndarray | float):
                        np.testing.assert_allclose(got, wanted, rtol=1e-12, err_msg=field.name)
                    else:
                        assert got == wanted, field.name


def test_rows_of_an_averaged_gradient_count_once() -> None:
    """Rows that both ranks see are rows of one gradient, made of the samples of both."""
    gradient = torch.ones(3, 2)
    gradient[1] = 0.0
    rows = tally_rows(gradient, 0, 16)
    assert isinstance(rows, UnitTally)
    results, _ = merge_in_threads([[StepRecord(0, {}, 0.0, units={"w": rows})]] * 2, [{}] * 2)
    for (merged,) in results:
        found = merged.units["w"]
        assert (found.flat.tolist(), found.counted, found.samples) == ([0, 1, 0], 1, 32)
        assert found.dead_flat.tolist() == [False, True, False]


def test_two_reductions_a_flush_once_tags_are_known() -> None:
    """The first flush finds out the tags; each later one is one reduction of maxima and one of sums."""
    ranks = [[record(step, {"a": [1.0], "b": [2.0 + rank]}) for step in range(5)] for rank in range(2)]
    _, reductions = merge_in_threads(ranks, [{}, {}])
    assert reductions == [4 + 2 * 4, 4 + 2 * 4], "maxima, length of tags, maxima, sums; then two each"


def test_a_tag_that_comes_later_joins() -> None:
    """A module that only one rank calls, at its second step, is in both ranks' records from there."""
    ranks = [
        [record(0, {"a": [1.0]}), record(1, {"a": [1.0]}), record(2, {"a": [1.0]})],
        [record(0, {"a": [1.0]}), record(1, {"a": [1.0], "late": [4.0]}), record(2, {"a": [1.0]})],
    ]
    results, _ = merge_in_threads(ranks, [{}, {}])
    for found in results:
        assert [list(merged) for merged in found] == [
            ["Activations/a"], ["Activations/a", "Activations/late"], ["Activations/a"]
        ]  # fmt: skip
        assert found[1]["Activations/late"].max == 4.0


def test_copies_count_once_and_what_differs_is_added() -> None:
    """What might be a copy counts once where all ranks agree to the bit, and is added where they do not."""
    unknown: dict[str, bool | None] = {"copy": None, "own": None, "lone": None}
    ranks = [
        [record(0, {"copy": [1.0, 2.0], "own": [1.0, 2.0]})],
        [record(0, {"copy": [1.0, 2.0], "own": [1.0, 2.5], "lone": [7.0]})],
    ]
    results, _ = merge_in_threads(ranks, [unknown, unknown])
    for (merged,) in results:
        assert {tag: sketch.count for tag, sketch in merged.items()} == {
            "Activations/copy": 2, "Activations/own": 4, "Activations/lone": 1
        }  # fmt: skip


def test_what_is_known_to_be_a_copy_is_left_out() -> None:
    """Values of a rank that is known to hold a copy do not enter the sums."""
    ranks = [[record(0, {"a": [1.0, 3.0]})], [record(0, {"a": [1.0, 3.0]})]]
    results, _ = merge_in_threads(ranks, [{"a": True}, {"a": False}])
    assert results[1][0]["Activations/a"].count == 2


def test_ranks_at_different_steps_are_an_error() -> None:
    """Records of different steps are never added up."""
    with pytest.raises(RanksError, match="different steps, 3 and 4"):
        merge_in_threads([[record(3, {"a": [1.0]})], [record(4, {"a": [1.0]})]], [{}, {}])
