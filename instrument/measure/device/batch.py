"""Measuring where a tensor lies, without ever waiting for the device: sketches come later, all with one copy.

What is measured between two flushes on one device is a row each of accumulators: counts of codes and moments. Rows
that are complete travel together, in one asynchronous copy to pinned memory with an event behind it; whoever asks for
a sketch, which is the writer's thread, waits for that event. The training thread launches kernels and nothing else.

| | with Triton | without |
| --- | --- | --- |
| codes and moments | one kernel that reads each value once | a dozen operations of torch; not `bincount`, which waits |
| many small tensors | one launch for all of them | one tensor after the other |

A row is 33 kB, so a batch of many rows is sent before the step ends: what has arrived is merged on the host, and
micro-batches do not pile up on the device. Each stream has rows of its own: a block that one had set to zero, another
would write to before that is done. While a CUDA graph is captured nothing is measured: a replay would add to
rows that are gone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from instrument.measure.device.accumulating import FLOATS, NEW_MOMENTS, accumulate, kernel_for, on
from instrument.measure.device.edge import CapturingError, Done, Edge, edge_for
from instrument.measure.histogram import CODES
from instrument.measure.sketch import MOMENTS, Sketch, empty_moments
from instrument.measure.tensors import Values
from instrument.torch_private import Unseen

__all__ = ["WIDTH", "DeviceBatch", "DeviceSketch", "Devices", "sketch_of"]

WIDTH = CODES + 8
"""Columns of a row of accumulators: codes, moments in the bits of float64, and room to keep rows aligned."""

_ROWS = 64
_MOST_ROWS = 1024
"""Rows of a batch, 34 MB, from which on it is sent though the step goes on."""


class DeviceBatch:
    """Rows of accumulators that one stream of a device fills and that travel to the host together.

    Args:
        device: Where the rows lie; its current stream is the one that fills them.
        edge: What only a real device can do.
    """

    def __init__(self, device: torch.device, edge: Edge) -> None:
        self.device = device
        self.rows: list[torch.Tensor] = []
        """Blocks of rows, int64 of shape (64, `WIDTH`)."""
        self.stream: Any = edge.stream(device)
        """The stream that fills the rows."""
        self.is_sent = False
        self._edge = edge
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
        row = self._new_row()
        codes, moments = self._accumulators(row)
        accumulate(values, codes, moments)
        return DeviceSketch(self, row)

    def add_small(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch]:
        """Measure several small tensors of one type as they are now, in one launch where Triton is there.

        Args:
            tensors: Plain, dense, of one floating-point type, at most 64, each with at least one element.
        """
        kernel = kernel_for(self.device)
        if kernel is None or len(tensors) == 1 or tensors[0].dtype not in FLOATS:
            return [self.add(Values(tensor, 1, 0)) for tensor in tensors]
        if self._edge.is_capturing():
            raise CapturingError
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
        with on(self.device):
            kernel.accumulate_segments(flat, self._edge.to_device(starts, self.device), block)
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
            with Unseen(), on(self.device):
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
        return sketch_of(host[row * WIDTH : (row + 1) * WIDTH])

    def _new_row(self) -> int:
        row = self._used
        if row // _ROWS == len(self.rows):
            block = torch.zeros((_ROWS, WIDTH), dtype=torch.int64, device=self.device)
            moments = block[:, CODES : CODES + MOMENTS].view(torch.float64)
            for column, value in enumerate(NEW_MOMENTS[3:], 3):
                moments[:, column].fill_(value)
            self.rows.append(block)
        self._used += 1
        return row

    def _accumulators(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = self.rows[row // _ROWS][row % _ROWS]
        return numbers[:CODES], numbers[CODES : CODES + MOMENTS].view(torch.float64)


def sketch_of(row: torch.Tensor) -> Sketch:
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
    """The batches that fill, one for each stream of each device that has an edge.

    Example:
        >>> Devices().send()
    """

    def __init__(self) -> None:
        self._batches: dict[tuple[torch.device, Hashable], DeviceBatch] = {}

    def add(self, values: Values) -> DeviceSketch:
        """Measure a tensor as it is now, where it lies; call it under `Unseen`.

        Raises:
            CapturingError: A CUDA graph is being captured.
        """
        return self._batch(values.tensor.device).add(values)

    def add_small(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch]:
        """The same for several small tensors of one type, on one device; see `DeviceBatch`."""
        return self._batch(tensors[0].device).add_small(tensors)

    def send(self) -> None:
        """Start the copies to the host; what is added from then on travels later."""
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            batch.send()

    def _batch(self, device: torch.device) -> DeviceBatch:
        edge = edge_for(device)
        assert edge is not None, f"{device} has no edge"
        key = device, edge.stream(device)
        batch = self._batches.get(key)
        if batch is None or batch.is_full or batch.is_sent:
            if batch is not None:
                batch.send()
            batch = self._batches[key] = DeviceBatch(device, edge)
        return batch
