"""Measuring on a device, with a CPU in its place and a list for its queue: the same sketches, later, by one copy."""

from __future__ import annotations

import re
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.errors import InstrumentWarning, UnmeasurableError
from instrument.measure.custom_op import measure
from instrument.measure.device import CapturingError, DeviceBatch, Devices, DeviceSketch, accumulate, accumulating
from instrument.measure.device import batch as batches
from instrument.measure.device import devices as devices_room
from instrument.measure.device.columns import FIELDS, DeviceColumns
from instrument.measure.device.edge import CudaEdge
from instrument.measure.device.rows import WIDTH
from instrument.measure.histogram import IntArray
from instrument.measure.pending import Divided
from instrument.measure.sketch import CODES, Sketch, empty_moments
from instrument.measure.tensors import Values, readable
from instrument.measure.units import tally_on_device
from instrument.torch_private import Unseen

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECIAL = [0.0, -0.0, 1e-45, 1e-40, -1.4e-39, 1e-300, 3.4e38, 1e300, float("nan"), float("inf"), -float("inf"), 1.0]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))


class Queue:
    """Stands for a device that works behind the caller's back: copies arrive when somebody waits for them."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waits: list[str] = []
        self.capturing = False
        self.current = "first"
        self.collected: list[tuple[str, str]] = []

    def is_capturing(self) -> bool:
        return self.capturing

    def mark(self) -> Any:
        return self

    def query(self) -> bool:
        return all(torch.equal(host, tensor) for host, tensor in self.copies)

    def to_host(self, tensor: torch.Tensor, made: Any) -> tuple[torch.Tensor, Any]:
        host = torch.full_like(tensor, -1)
        self.copies.append((host, tensor.clone()))
        return host, self

    def to_device(self, numbers: IntArray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(numbers).to(device)

    def synchronize(self) -> None:
        self.waits.append(threading.current_thread().name)
        for host, tensor in self.copies:
            host.copy_(tensor)

    def stream(self, device: torch.device) -> str:
        return self.current

    def collects(self, batch: DeviceBatch) -> None:
        self.collected.append((self.current, batch.stream))


def add(batch: DeviceBatch, tensor: torch.Tensor) -> DeviceSketch:
    with Unseen():
        found = batch.add(readable(tensor))
    assert found is not None
    return found


def assert_same(found: Sketch, expected: Sketch) -> None:
    assert found.codes.tolist() == expected.codes.tolist()
    assert found.counts.tolist() == expected.counts.tolist()
    for field in ("count", "zero_count", "nan_count", "inf_count", "low", "high"):
        assert getattr(found, field) == getattr(expected, field), field
    rounding = 1e-12 * expected.abs_max * expected.count if expected.count else 0.0
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-12, atol=rounding)
    np.testing.assert_allclose(found.total_squares, expected.total_squares, rtol=1e-12)


def batch() -> tuple[DeviceBatch, Queue]:
    queue = Queue()
    return DeviceBatch(torch.device("cpu"), queue), queue


@settings(max_examples=80, deadline=None)
@given(st.lists(NUMBERS, max_size=40), st.sampled_from(TYPES))
def test_operations_without_triton_give_the_codes_of_the_cpu_engine(values: list[float], dtype: torch.dtype) -> None:
    """Whatever the values and their type, counts and extremes are those of the CPU engine, and sums within rounding."""
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    rows, _ = batch()
    assert_same(add(rows, tensor).sketch(), measure(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(-5, 300),
        torch.tensor([True, False, True]),
        torch.tensor([3 + 4j, 0j]),
        torch.tensor([[1.0], [2.0]]).expand(2, 7),
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).t()[::2],
        torch.eye(5).to_sparse(),
        torch.empty(0),
    ],
    ids=["whole", "bool", "complex", "expanded", "strided", "sparse", "empty"],
)
def test_tensors_of_all_kinds(tensor: torch.Tensor) -> None:
    """Integers, bools, complex, expanded, strided, sparse and empty tensors are measured as on the CPU."""
    rows, _ = batch()
    assert_same(add(rows, tensor).sketch(), measure(tensor))


def test_everything_travels_in_one_copy_that_nobody_waits_for() -> None:
    """A hundred tensors and a scale make one copy at the flush; the first wait is by the thread that reads."""
    rows, queue = batch()
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(5 + size, generator=generator) for size in range(100)]
    later = [add(rows, tensor) for tensor in tensors]
    scaled = Divided(later[0], 1024.0)
    assert queue.copies == []
    rows.send()
    rows.send()
    assert len(queue.copies) == 1
    assert queue.waits == []
    assert [scaled.is_there] == [False]
    found: list[Sketch] = []
    reader = threading.Thread(target=lambda: found.extend(sketch.sketch() for sketch in later), name="reader")
    reader.start()
    reader.join()
    assert queue.waits == ["reader"]
    assert [scaled.is_there] == [True]
    for sketch, tensor in zip(found, tensors, strict=True):
        assert_same(sketch, measure(tensor))
    assert_same(scaled.sketch(), measure(tensors[0] / 1024.0))


def test_what_is_sent_takes_no_more() -> None:
    """A tensor that comes while another thread sends the batch goes into the next one, and none is lost."""
    rows, queue = batch()
    first = add(rows, torch.ones(3))
    rows.send()
    with Unseen():
        assert rows.add(readable(torch.ones(2))) is None
        assert rows.add_many([torch.ones(2), torch.ones(4)]) is None
    devices, given = Devices(), iter((rows, DeviceBatch(torch.device("cpu"), queue)))
    devices._batch = lambda device: next(given)  # type: ignore[method-assign]
    with Unseen():
        later = devices.add(readable(torch.ones(5)))
    assert (first.sketch().count, later.sketch().count) == (3, 5)


def test_a_copy_that_cannot_be_started_is_told_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training thread hears nothing of it; each sketch of the batch raises what went wrong."""
    rows, queue = batch()
    later = [add(rows, torch.ones(3)), add(rows, torch.zeros(2))]

    def broken(*_: object) -> None:
        raise MemoryError("no pinned memory")

    monkeypatch.setattr(queue, "to_host", broken)
    rows.send()
    for sketch in later:
        with pytest.raises(MemoryError, match="no pinned memory"):
            sketch.sketch()


def test_values_are_those_when_the_tensor_was_given() -> None:
    """What happens to a tensor afterwards is not seen."""
    rows, _ = batch()
    tensor = torch.ones(4)
    later = add(rows, tensor)
    tensor.zero_()
    assert later.sketch().mean == 1.0


def test_tensors_together_are_those_one_by_one() -> None:
    """Several tensors, given at one time between others that come alone, each get a sketch of their own."""
    rows, _ = batch()
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(1 + size, generator=generator) for size in range(40)]
    with Unseen():
        given = [rows.add_many(tensors), [rows.add(readable(tensors[0]))], rows.add_many(tensors)]
    later = [sketch for part in given for sketch in part or ()]
    for sketch, tensor in zip(later, [*tensors, tensors[0], *tensors], strict=True):
        assert sketch is not None
        assert_same(sketch.sketch(), measure(tensor))


def test_no_stream_writes_to_the_rows_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors measured on two streams in turn, each fills rows that it has made; the sender waits for both."""
    queue, devices = Queue(), Devices()
    monkeypatch.setattr(devices_room, "edge_for", lambda device: queue)
    writers: dict[int, set[str]] = {}
    launch = accumulate

    def watched(values: Values, codes: torch.Tensor, moments: torch.Tensor) -> None:
        writers.setdefault(codes.untyped_storage().data_ptr(), set()).add(queue.current)
        launch(values, codes, moments)

    monkeypatch.setattr(batches, "accumulate", watched)
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(7, generator=generator) for _ in range(200)]
    later = []
    for number, tensor in enumerate(tensors):
        queue.current = "side" if number % 3 == 0 else "first"
        with Unseen():
            later.append(devices.add(readable(tensor)))
    assert len(writers) >= 4  # blocks of 32 rows
    assert all(len(streams) == 1 for streams in writers.values())
    queue.current = "third"
    devices.send()
    assert sorted(queue.collected) == [("third", "first"), ("third", "side")]
    for sketch, tensor in zip(later, tensors, strict=True):
        assert_same(sketch.sketch(), measure(tensor))


def test_nothing_is_measured_while_a_graph_is_captured() -> None:
    """A capture is refused before anything is launched: a replay would write to rows that are gone."""
    rows, queue = batch()
    queue.capturing = True
    with pytest.raises(CapturingError, match="a CUDA graph is being captured"):
        add(rows, torch.ones(3))
    assert rows.blocks == []


def test_accumulators_are_added_to() -> None:
    """As the operator does, values join what the accumulators hold."""
    codes, moments = torch.zeros(CODES, dtype=torch.int64), torch.tensor(empty_moments())
    first, second = torch.tensor([1.0, -3.0]), torch.tensor([0.5, float("nan")])
    with Unseen():
        for tensor in (first, second):
            accumulate(Values(tensor, 1, 0), codes, moments)
    assert_same(Sketch.from_dense(codes.numpy(), moments.tolist()), measure(torch.cat([first, second])))


class Broken:
    """Stands for kernels that cannot be compiled."""

    def __init__(self) -> None:
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        from instrument.measure.device import kernel, unit_kernel

        def fails(*arguments: Any) -> None:
            self.asked += 1
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        is_launch = name in {"accumulate_values", "accumulate_runs", "tally_units", "tally_positions", "find_rows"}
        return fails if is_launch else getattr(kernel, name, None) or getattr(unit_kernel, name)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Triton is there for every device, and cannot be used."""
    found = Broken()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(accumulating, "_given_up", [])
    for name in ("_imported_kernel", "_imported_unit_kernel"):
        monkeypatch.setattr(accumulating, name, lambda: found)
    return found


@pytest.mark.parametrize("together", [False, True])
def test_where_triton_cannot_compile_operations_of_torch_measure(broken: Broken, together: bool) -> None:
    """The first launch that fails loses nothing, is told of once, and no other is tried."""
    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (5, 300, 7)]
    tensors.append(torch.randn(20, generator=torch.Generator().manual_seed(0)).view(1, 20).expand(3, 20))
    rows, _ = batch()
    with pytest.warns(InstrumentWarning, match="Triton cannot be used here .Failed to find C compiler") as told:
        if together:
            with Unseen():
                found = rows.add_many(tensors[:3])
            assert found is not None
        else:
            found = [add(rows, tensor) for tensor in tensors]
    for later, tensor in zip(found, tensors, strict=False):
        assert_same(later.sketch(), measure(tensor))
    assert (len(told), broken.asked) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_what_the_device_lacks_is_no_fault_of_triton(
    error: Exception, broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has no memory left, or failed before, the error is passed on, and kernels are asked for again."""

    def fails(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(broken, "accumulate_values", fails, raising=False)
    rows, _ = batch()
    for _ in range(2):
        with pytest.raises(type(error), match=re.escape(str(error))):
            add(rows, torch.ones(3))
    assert accumulating.kernel_for(torch.device("cpu")) is broken


def test_units_go_another_way_where_their_kernel_fails(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor at which it fails is not tallied, which is told of; the next one is, by operations of torch."""
    monkeypatch.setattr(devices_room, "edge_for", lambda device: Queue())
    values, devices = torch.tensor([[1.0, -5.0], [2.0, -3.0]]), Devices()
    with Unseen():
        with pytest.warns(InstrumentWarning, match="Triton cannot be used"), pytest.raises(UnmeasurableError):
            tally_on_device(values, 1, None, devices)
        assert tally_on_device(values, 1, None, devices).fetch().low.tolist() == [1.0, -5.0]
        assert not devices.can_find_rows(values)
    assert broken.asked == 1


def test_readers_that_come_together_find_rows_and_columns() -> None:
    """Three threads that ask while the copy is taken apart get their columns, however late they come."""
    for run in range(20):
        rows, _ = batch()
        taken = [rows._columns.take(FIELDS, 8192) for _ in range(40)]
        lates = [DeviceColumns(rows, number, first, 8192) for number, first, _ in taken[-3:]]
        rows.send()
        found: list[float] = []

        def ask(late: DeviceColumns, delay: float, found: list[float] = found) -> None:
            time.sleep(delay)
            found.append(float(late.fetch()[0, 0]))

        readers = [threading.Thread(target=ask, args=(late, n * run / 500)) for n, late in enumerate(lates)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert found == [float("inf")] * 3


def test_columns_fill_a_batch_as_rows_do() -> None:
    """34 MB of either are sent before the step ends."""
    rows, _ = batch()
    for _ in range(batches._MOST_ROWS * WIDTH // (FIELDS * 8192)):
        rows._columns.take(FIELDS, 8192)
    assert not rows.is_full
    for _ in range(2):
        rows._columns.take(FIELDS, 8192)
    assert rows.is_full


def test_a_stream_that_collects_keeps_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is told of every block that another stream reads than the one that fills it, and of none otherwise."""
    told: list[tuple[str, object]] = []

    class Block:
        def record_stream(self, stream: object) -> None:
            told.append(("record", self))

    class Stream:
        def wait_stream(self, stream: object) -> None:
            told.append(("wait", stream))

    rows, queue = batch()
    rows.blocks, rows._columns.blocks = [Block()], [Block(), Block()]  # type: ignore[list-item]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queue.current)
    CudaEdge().collects(rows)
    assert told == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    CudaEdge().collects(rows)
    assert told == [("wait", "first"), *(("record", block) for block in rows.memory)]
    assert len(rows.memory) == 3


def test_what_was_measured_before_a_launch_failed_counts_once(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of several launches of which the second fails, the rest is measured another way."""
    monkeypatch.setattr(accumulating, "_LAUNCH", 1000)
    calls: list[int] = []

    def fails_second(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
        calls.append(values.numel())
        if len(calls) == 2:
            raise RuntimeError("Failed to find C compiler")
        accumulating._accumulate_plainly(values, codes, moments)

    monkeypatch.setattr(broken, "accumulate_values", fails_second, raising=False)
    rows, _ = batch()
    with pytest.warns(InstrumentWarning, match="Triton cannot be used"):
        found = add(rows, torch.ones(3000))
    assert (found.sketch().count, found.sketch().total, calls) == (3000, 3000.0, [1000, 1000])


def test_rows_of_a_second_type_go_another_way_when_the_first_has_failed(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that was there when they were asked about, and is given up, is no fault of ours."""
    monkeypatch.setattr(devices_room, "edge_for", lambda device: Queue())
    devices, gradient = Devices(), torch.ones(2, 3)
    with Unseen():
        assert devices.can_find_rows(gradient)
        for _ in range(2):
            with warnings.catch_warnings(), pytest.raises(UnmeasurableError, match="could not be launched"):
                warnings.simplefilter("ignore")
                devices.find_rows([gradient])
            with pytest.raises(UnmeasurableError, match="could not be launched"):
                devices.tally(gradient, (2, 3, 1), None)
    assert broken.asked == 1
