"""Packed sketches are those that were packed, in a tenth of the memory."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument import Sketch, measure
from instrument.measure.batch import measure_later
from instrument.record import packing
from instrument.record.buffer import StepRecord
from instrument.record.packing import PART, SketchStore

pytestmark = pytest.mark.usefixtures("engine")

VALUES = st.lists(
    st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-45, -3e38])), max_size=30
)


def assert_same(found: Sketch, expected: Sketch) -> None:
    for field in dataclasses.fields(Sketch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist()
        else:
            assert (type(one), one) == (type(other), other), field.name


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=5), st.sampled_from([1, 300, 70_000, 2**33]))
def test_packed_sketches_are_the_same_in_every_field(values: list[list[float]], times: int) -> None:
    """Whatever was measured, and however often each code occurs, every field comes back with its type."""
    sketches = {}
    for number, each in enumerate(values):
        sketch = measure(torch.tensor(each, dtype=torch.float32))
        sketches[f"Gradients/{number}"] = dataclasses.replace(sketch, counts=sketch.counts * times)
    store = SketchStore(sketches)
    statistics = store.statistics().copy()
    store.pack()
    assert list(store) == list(sketches)
    assert len(store) == len(sketches)
    for tag, expected in sketches.items():
        assert tag in store
        assert_same(store[tag], expected)
    assert "Gradients/none" not in store
    np.testing.assert_array_equal(store.statistics(), statistics)


def test_parts_are_told_apart() -> None:
    """Of several hundred sketches each is found in its part, whatever the order in which they are asked for."""
    generator = torch.Generator().manual_seed(0)
    sketches = {f"Parameters/{n}": measure(torch.randn(1 + n, generator=generator)) for n in range(2 * PART + 7)}
    store = SketchStore(sketches)
    store.pack()
    for place in torch.randperm(len(sketches), generator=generator).tolist():
        assert_same(store[f"Parameters/{place}"], sketches[f"Parameters/{place}"])


def test_records_of_a_step_share_what_is_packed_and_an_unpacked_sketch_is_nobody_elses() -> None:
    """To pack one record packs the other; to change the arrays of a sketch that was read changes no other reader's."""
    store = SketchStore({"Gradients/w": measure(torch.tensor([1.0, 2.0]))})
    first, second = StepRecord(0, store, 0.0), StepRecord(0, store, 0.0)
    first.pack()
    second["Gradients/w"].counts[:] = 7
    assert second["Gradients/w"].counts.tolist() == first["Gradients/w"].counts.tolist() == [1, 1]
    joined = first.joined(StepRecord(0, {"Gradients/b": measure(torch.tensor([3.0]))}, 0.0))
    assert {tag: sketch.mean for tag, sketch in joined.items()} == {"Gradients/w": 1.5, "Gradients/b": 3.0}


def test_readers_are_not_disturbed_by_packing() -> None:
    """A thread that reads every sketch again and again while another packs finds what was measured."""
    sketches = {f"Gradients/{n}": measure(torch.full((3,), float(n))) for n in range(300)}
    for _ in range(5):
        store = SketchStore(sketches)
        faults: list[str] = []

        def read(store: SketchStore = store, faults: list[str] = faults) -> None:
            for _ in range(3):
                faults.extend(tag for n, tag in enumerate(store) if store[tag].mean != n)

        reader = threading.Thread(target=read)
        reader.start()
        store.pack()
        reader.join()
        assert faults == []


def test_records_that_several_threads_work_out_at_once_are_whole() -> None:
    """Threads that ask for all columns while another packs are each given those of every sketch."""
    sketches = {f"Gradients/{n}": measure(torch.full((3,), float(n))) for n in range(300)}
    for _ in range(20):
        store = SketchStore(sketches)
        found: list[list[float]] = []
        readers = [
            threading.Thread(
                target=lambda store=store, found=found: found.append(store.columns().column("low").tolist())
            )
            for _ in range(3)
        ]
        for reader in readers:
            reader.start()
        store.pack()
        for reader in readers:
            reader.join()
        assert found == [[float(n) for n in range(300)]] * 3
        assert store["Gradients/7"].mean == 7.0


def test_a_reader_has_places_and_sources_of_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may turn a step into columns and pack it at any moment while one of its sketches is read."""
    tensors = [torch.full((3,), float(value)) for value in range(4)]
    item = packing._item

    def as_it_is(store: SketchStore) -> Sketch:
        found = store.as_they_are()["b"]
        return found if isinstance(found, Sketch) else found.sketch()

    for read in (lambda store: store["b"], as_it_is):
        store = SketchStore(dict(zip("abcd", range(4), strict=True)), [measure_later(tensors)])

        def meanwhile(*arguments: Any, store: SketchStore = store) -> Any:
            store.columns()
            store.pack()
            return item(*arguments)

        monkeypatch.setattr(packing, "_item", meanwhile)
        assert read(store).mean == 1.0
        monkeypatch.setattr(packing, "_item", item)
        assert [sketch.mean for sketch in store.values()] == [0.0, 1.0, 2.0, 3.0]


def test_a_record_that_waits_counts_the_values_that_it_holds() -> None:
    """Copies of small tensors, four bytes an element, until they are measured; and something for each sketch."""
    column = measure_later([torch.ones(100), torch.ones(28)])
    store = SketchStore({"Gradients/a": 0, "Gradients/b": 1}, [column])
    record = StepRecord(0, store, 0.0)
    assert record.held == 2 * packing.BYTES_PER_SKETCH + 4 * 128
    record.statistics()
    assert record.held == 2 * packing.BYTES_PER_SKETCH
    record.pack()
    assert record.held == 2 * packing.BYTES_PER_SKETCH
