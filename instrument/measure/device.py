"""Measuring where a tensor lies, without ever waiting for the device: sketches come later, all with one copy.

What is measured between two flushes on one device is a row each of accumulators: counts of codes and moments. Rows
that are complete travel together, in one asynchronous copy to pinned memory with an event behind it; whoever asks for
a sketch, which is the writer's thread, waits for that event. The training thread launches kernels and nothing else.

| | with Triton | without |
| --- | --- | --- |
| codes and moments | one kernel that reads each value once | a dozen operations of torch; not `bincount`, which waits |
| many small tensors | one launch for all of them | one tensor after the other |

A row is 33 kB, so a batch of many rows is sent before the step ends: what has arrived is merged on the host, and
micro-batches do not pile up on the device. While a CUDA graph is captured nothing is measured: a replay would add to
rows that are gone.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from instrument.errors import UnmeasurableError
from instrument.measure.histogram import CODES, SIGN
from instrument.measure.sketch import MOMENTS, Sketch, empty_moments
from instrument.measure.tensors import Values, chunks
from instrument.torch_private import Unseen

__all__ = [
    "CapturingError",
    "DeviceBatch",
    "DeviceSketch",
    "Devices",
    "Edge",
    "LateNumber",
    "Marked",
    "RowSketch",
    "accumulate",
    "edge_for",
    "is_capturing",
]

WIDTH = CODES + 8
"""Columns of a row of accumulators: codes, moments in the bits of float64, and room to keep rows aligned."""

_ROWS = 64
_MOST_ROWS = 1024
"""Rows of a batch, 34 MB, from which on it is sent though the step goes on."""

_PIECE = 1 << 22
"""Elements that are worked on at once without Triton, where float64 copies of them are made."""

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_LARGEST = torch.finfo(torch.float32).max
_NAN_CODE = 0x7FC
_NEW_MOMENTS = (0.0, 0.0, 0.0, float("inf"), float("-inf"))


class CapturingError(UnmeasurableError):
    """A CUDA graph is being captured."""

    def __init__(self) -> None:
        super().__init__("a CUDA graph is being captured: what runs inside of it is not measured")


class Done(Protocol):
    """Stands behind work that was given to a device."""

    def query(self) -> bool:
        """Whether the work is done."""

    def synchronize(self) -> None:
        """Return when the work is done."""


class Edge(Protocol):
    """What only a real device can do; tests put a stand-in here."""

    def is_capturing(self) -> bool:
        """Whether a graph is being captured from what is launched now."""

    def mark(self) -> Done:
        """What tells when all that was launched so far is done."""

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Done]:
        """Start to copy a tensor to the host; gives the copy and what tells when it is there."""

    def to_device(self, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        """Whole numbers on a device, without a wait."""

    def writes(self, batch: DeviceBatch) -> None:
        """The current stream is about to write to a batch."""

    def written(self, batch: DeviceBatch) -> None:
        """The current stream has written to a batch."""

    def collects(self, batch: DeviceBatch) -> None:
        """The current stream is about to read what all streams wrote to a batch."""


class CudaEdge:
    """CUDA through `torch.cuda`."""

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Done]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host, self.mark()

    def mark(self) -> Done:
        event = torch.cuda.Event()
        event.record()
        done: Done = event
        return done

    def to_device(self, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)

    def writes(self, batch: DeviceBatch) -> None:
        stream = torch.cuda.current_stream(batch.device)
        if batch.stream is None:
            batch.stream = stream
        elif stream != batch.stream:  # rows were made on the first stream
            stream.wait_stream(batch.stream)
            for rows in batch.rows:
                rows.record_stream(stream)

    def written(self, batch: DeviceBatch) -> None:
        stream = torch.cuda.current_stream(batch.device)
        if stream != batch.stream:
            event = torch.cuda.Event()
            event.record(stream)
            batch.others[stream] = event

    def collects(self, batch: DeviceBatch) -> None:
        stream = torch.cuda.current_stream(batch.device)
        if batch.stream is not None and stream != batch.stream:
            stream.wait_stream(batch.stream)
            for rows in batch.rows:
                rows.record_stream(stream)
        for event in batch.others.values():
            stream.wait_event(event)


def edge_for(device: torch.device) -> Edge | None:
    """The edge of a device on which tensors are measured where they lie; None for all others.

    Example:
        >>> edge_for(torch.device("cpu")) is None
        True
    """
    return CudaEdge() if device.type == "cuda" else None


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())


class DeviceBatch:
    """Rows of accumulators on one device that travel to the host together.

    Args:
        device: Where the rows lie.
        edge: What only a real device can do.
    """

    def __init__(self, device: torch.device, edge: Edge | None = None) -> None:
        self.device = device
        self.rows: list[torch.Tensor] = []
        """Blocks of rows, int64 of shape (64, `WIDTH`)."""
        self.stream: Any = None
        """The stream that made the rows."""
        self.others: dict[Any, Any] = {}
        """The last event of every other stream that has written."""
        self.is_sent = False
        self._edge: Edge = edge or CudaEdge()
        self._used = 0
        self._host: torch.Tensor | None = None
        self._done: Done | None = None
        self._lock = threading.RLock()

    def add(self, values: Values) -> DeviceSketch:
        """Measure a tensor as it is now; call it under `Unseen`.

        Args:
            values: On the device of the batch.

        Returns:
            What will give the sketch.

        Raises:
            CapturingError: A CUDA graph is being captured.
        """
        if self._edge.is_capturing():
            raise CapturingError
        self._edge.writes(self)
        row = self._new_row()
        codes, moments = self._accumulators(row)
        accumulate(values, codes, moments)
        self._edge.written(self)
        return DeviceSketch(self, row)

    def add_small(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch]:
        """Measure several small tensors of one type as they are now, in one launch where Triton is there.

        Args:
            tensors: Plain, dense, of one floating-point type, at most 64, each with at least one element.
        """
        kernel = _kernel(self.device)
        if kernel is None or len(tensors) == 1 or tensors[0].dtype not in _FLOATS:
            return [self.add(Values(tensor, 1, 0)) for tensor in tensors]
        if self._edge.is_capturing():
            raise CapturingError
        self._edge.writes(self)
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + tensor.numel())
        if self._used % _ROWS + len(tensors) > _ROWS:  # the rows of one launch stand together
            self._used += _ROWS - self._used % _ROWS
        first = self._used
        for _ in tensors:
            self._new_row()
        block = self.rows[first // _ROWS][first % _ROWS : first % _ROWS + len(tensors)]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _on(self.device):
            kernel.accumulate_segments(flat, self._edge.to_device(starts, self.device), block)
        self._edge.written(self)
        return [DeviceSketch(self, first + index) for index in range(len(tensors))]

    @property
    def is_full(self) -> bool:
        """Whether it is time to send it."""
        return self._used >= _MOST_ROWS

    @property
    def is_there(self) -> bool:
        """Whether the copy has arrived."""
        return self.is_sent and (self._done is None or self._done.query())

    def send(self) -> None:
        """Start the copy to the host; nothing is added from then on, and nothing waits."""
        with self._lock:
            if self.is_sent:
                return
            self.is_sent = True
            if not self._used:
                return
            with Unseen(), _on(self.device):
                self._edge.collects(self)
                self._host, self._done = self._edge.to_host(torch.cat([block.view(-1) for block in self.rows]))
            self.rows.clear()

    def found(self, row: int) -> Sketch:
        """The sketch of a row; waits until the copy is there, and starts it where that was not done."""
        self.send()
        with self._lock:
            host, done = self._host, self._done
            assert host is not None
            if done is not None:
                done.synchronize()
                self._done = None
        return _sketch_of(host[row * WIDTH : (row + 1) * WIDTH])

    def _new_row(self) -> int:
        row = self._used
        if row // _ROWS == len(self.rows):
            block = torch.zeros((_ROWS, WIDTH), dtype=torch.int64, device=self.device)
            moments = block[:, CODES : CODES + MOMENTS].view(torch.float64)
            for column, value in enumerate(_NEW_MOMENTS[3:], 3):
                moments[:, column].fill_(value)
            self.rows.append(block)
        self._used += 1
        return row

    def _accumulators(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = self.rows[row // _ROWS][row % _ROWS]
        return numbers[:CODES], numbers[CODES : CODES + MOMENTS].view(torch.float64)


def _sketch_of(row: torch.Tensor) -> Sketch:
    """The sketch of a row on the host; nothing where a graph could not measure, which makes the count NaN."""
    moments = row[CODES : CODES + MOMENTS].view(torch.float64).tolist()
    if math.isnan(moments[0]):
        return Sketch.from_dense(np.zeros(CODES, np.int64), empty_moments().tolist())
    return Sketch.from_dense(row[:CODES].numpy(), moments)


class DeviceSketch:
    """The sketch of a tensor on a device, on its way to the host."""

    __slots__ = ("_batch", "_found", "_row")

    def __init__(self, batch: DeviceBatch, row: int) -> None:
        self._batch: DeviceBatch | None = batch
        self._row = row
        self._found: Sketch | None = None

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        batch = self._batch
        return batch is None or batch.is_there

    def sketch(self) -> Sketch:
        """The sketch; waits until the copy is there."""
        batch = self._batch
        if batch is not None:
            self._found = batch.found(self._row)
            self._batch = None
        assert self._found is not None
        return self._found


class Devices:
    """The batches that fill, one a device.

    Example:
        >>> Devices().add(torch.device("cpu"), Values(torch.ones(3), 1, 0)) is None
        True
    """

    def __init__(self) -> None:
        self._batches: dict[torch.device, DeviceBatch] = {}

    def add(self, device: torch.device, values: Values) -> DeviceSketch | None:
        """Measure a tensor as it is now, where it lies; None where it is to be measured otherwise.

        Call it under `Unseen`.

        Raises:
            CapturingError: A CUDA graph is being captured.
        """
        batch = self._batch(device)
        return batch.add(values) if batch is not None else None

    def add_small(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch]:
        """The same for several small tensors of one type, on one device that has an edge; see `DeviceBatch`."""
        batch = self._batch(tensors[0].device)
        assert batch is not None
        return batch.add_small(tensors)

    def send(self) -> None:
        """Start the copies to the host; what is added from then on travels later."""
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            batch.send()

    def _batch(self, device: torch.device) -> DeviceBatch | None:
        batch = self._batches.get(device)
        if batch is None or batch.is_full or batch.is_sent:
            edge = edge_for(device)
            if edge is None:
                return None
            if batch is not None:
                batch.send()
            batch = self._batches[device] = DeviceBatch(device, edge)
        return batch


class Marked:
    """A tensor that nobody changes any more, and a mark behind what computes it.

    Args:
        tensor: On any device.
    """

    __slots__ = ("_done", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        edge = edge_for(tensor.device)
        self._done = edge.mark() if edge is not None else None

    @property
    def is_there(self) -> bool:
        """Whether it can be fetched without a wait for what computes it."""
        return self._done is None or self._done.query()

    def fetch(self) -> torch.Tensor:
        """The tensor on the host; waits for the device, whatever the stream it was computed on."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor.cpu()


class LateNumber:
    """A number that lies on a device, such as the scale of a gradient scaler, as it is now.

    Args:
        tensor: Of shape ().

    Example:
        >>> float(LateNumber(torch.tensor(1024.0)))
        1024.0
    """

    __slots__ = ("_found", "_marked")

    def __init__(self, tensor: torch.Tensor) -> None:
        with Unseen():
            self._marked: Marked | None = Marked(tensor.detach().clone())
        self._found = 1.0

    @property
    def is_there(self) -> bool:
        """Whether it is known without a wait."""
        marked = self._marked
        return marked is None or marked.is_there

    def __float__(self) -> float:
        marked = self._marked
        if marked is not None:
            self._found = float(marked.fetch())
            self._marked = None
        return self._found


class RowSketch:
    """The sketch of accumulators that a compiled graph filled on a device; they are made new.

    Args:
        codes: Int64 of shape (4096,).
        moments: Float64 of shape (5,).
    """

    __slots__ = ("_marked",)

    def __init__(self, codes: torch.Tensor, moments: torch.Tensor) -> None:
        with Unseen():
            self._marked = Marked(torch.cat((codes, moments.view(torch.int64))))
            codes.zero_()
            for place, value in enumerate(_NEW_MOMENTS):
                moments[place].fill_(value)

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        return self._marked.is_there

    def sketch(self) -> Sketch:
        """The sketch; waits for the device."""
        return _sketch_of(self._marked.fetch())


def accumulate(values: Values, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Add the values of a tensor to accumulators on its device; nothing waits. Call it under `Unseen`.

    Args:
        values: The values, on any device.
        codes: Int64 of shape (4096,), added to in place.
        moments: Float64 of shape (5,), combined in place: count, sum, sum of squares, minimum, maximum.
    """
    kernel = _kernel(values.tensor.device)
    add = _accumulate_plainly if kernel is None else kernel.accumulate_values
    own_codes, own_moments = codes, moments
    if values.repeat != 1:
        own_codes = torch.zeros_like(codes)
        own_moments = torch.empty_like(moments)
        for place, value in enumerate(_NEW_MOMENTS):
            own_moments[place].fill_(value)
    with _on(values.tensor.device):
        for piece in chunks(values.tensor, _PIECE if kernel is None else max(values.tensor.numel(), 1)):
            add(_as_floats(piece), own_codes, own_moments)
    if values.repeat != 1:
        codes += values.repeat * own_codes
        moments[:3] += values.repeat * own_moments[:3]
        torch.minimum(moments[3], own_moments[3], out=moments[3])
        torch.maximum(moments[4], own_moments[4], out=moments[4])
    if values.implied_zeros:
        codes[0] += values.implied_zeros
        moments[0] += values.implied_zeros
        moments[3].clamp_(max=0.0)
        moments[4].clamp_(min=0.0)


def _as_floats(piece: torch.Tensor) -> torch.Tensor:
    """The piece flat, in a type that the kernels read."""
    if piece.is_complex():
        piece = piece.to(torch.complex128 if piece.dtype is torch.complex128 else torch.complex64).abs()
    if piece.dtype not in _FLOATS:
        is_wide = piece.dtype in (torch.int32, torch.int64, torch.uint32, torch.uint64)
        piece = piece.to(torch.float64 if is_wide else torch.float32)
    return piece.reshape(-1)


def _accumulate_plainly(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """The same in operations of torch that do not wait for a device."""
    exact = values.double()
    is_finite = exact.isfinite()
    single = torch.where(is_finite, exact.clamp(-_LARGEST, _LARGEST), exact).float()
    code = (single.view(torch.int32) >> 20) & (CODES - 1)
    code = torch.where((code & (SIGN - 1) == 0) & (exact != 0), code + 1, code)
    code = torch.where(exact.isnan(), _NAN_CODE, code).long()
    codes.scatter_add_(0, code, torch.ones_like(code))
    finite = torch.where(is_finite, exact, 0.0)
    moments[:3] += torch.stack((is_finite.sum().double(), finite.sum(), finite.square().sum()))
    torch.minimum(moments[3], torch.where(is_finite, exact, float("inf")).amin(), out=moments[3])
    torch.maximum(moments[4], torch.where(is_finite, exact, float("-inf")).amax(), out=moments[4])


def _kernel(device: torch.device) -> Any:
    """The module with the Triton kernels, or None where Triton does not serve a device."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels on the CPU, for tests
    return _imported_kernel() if device.type == "cuda" or is_interpreted else None


@functools.cache
def _imported_kernel() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from instrument.measure import kernel

    return kernel


def _on(device: torch.device) -> Any:
    """Context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
