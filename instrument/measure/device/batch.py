"""Measuring where a tensor lies, without ever waiting for the device: sketches come later, all with one copy.

What is measured between two flushes on one device is a row each of accumulators: counts of codes and moments. Rows
that are complete travel together, in one asynchronous copy to pinned memory with an event behind it; whoever asks for
a sketch, which is the writer's thread, waits for that event. The training thread launches kernels and nothing else.

| | with Triton | without |
| --- | --- | --- |
| codes and moments | one kernel that reads each value once | a dozen operations of torch; not `bincount`, which waits |
| tensors that come together | one launch for all of them | one tensor after the other |

A row is 33 kB, so a batch of many rows is sent before the step ends: what has arrived is merged on the host, and
micro-batches do not pile up on the device. Each stream has rows of its own: a block that one had set to zero, another
would write to before that is done. While a CUDA graph is captured nothing is measured: a replay would add to
rows that are gone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from instrument.errors import UnmeasurableError
from instrument.measure.columns import Sketches
from instrument.measure.device.accumulating import (
    GIVEN_UP,
    accumulate,
    give_up,
    kernel_for,
    launching,
    on,
    unit_kernel_for,
)
from instrument.measure.device.columns import FIELDS, Columns, DeviceColumns
from instrument.measure.device.edge import CapturingError, Done, Edge
from instrument.measure.device.rows import NEW_MOMENTS, WIDTH, moments_of, sketches_of_rows
from instrument.measure.histogram import CODES
from instrument.measure.sketch import Sketch
from instrument.measure.slopes import Slopes
from instrument.measure.tensors import Values
from instrument.torch_private import Unseen

__all__ = ["DeviceBatch", "DeviceSketch"]

_ROWS = 32
"""Rows of a block for tensors that come one by one."""

_MOST_ROWS = 1024
"""Rows of a batch, 34 MB, or columns of as many bytes, from which on it is sent though the step goes on."""


class DeviceBatch:
    """Rows of accumulators that one stream of a device fills and that travel to the host together.

    Args:
        device: Where the rows lie; its current stream is the one that fills them.
        edge: What only a real device can do.
    """

    def __init__(self, device: torch.device, edge: Edge) -> None:
        self.device = device
        self.blocks: list[torch.Tensor] = []
        """Blocks of rows, int64 of shape (rows, `WIDTH`)."""
        self.stream: Any = edge.stream(device)
        """The stream that fills the rows."""
        self.is_sent = False
        self._edge = edge
        self._used = 0
        self._vacant: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._columns = Columns(device)
        self._shapes: list[tuple[int, ...]] = []
        self._host: torch.Tensor | None = None
        self._done: Done | None = None
        self._found: Sketches | None = None
        self._found_columns: list[npt.NDArray[np.float64]] = []
        self._failure: Exception | None = None
        self._lock = threading.RLock()

    def add(self, values: Values) -> DeviceSketch | None:
        """Measure a tensor as it is now; call it under `Unseen`.

        Args:
            values: On the device of the batch.

        Returns:
            What will give the sketch; None where the batch was sent meanwhile, by another thread.

        Raises:
            CapturingError: A CUDA graph is being captured.
        """
        if self._edge.is_capturing():
            raise CapturingError
        with self._lock:  # to make a block gives the interpreter lock up, and a row that is sent must be complete
            if self.is_sent:
                return None
            if not self._vacant:
                first, block = self._new_block(_ROWS)
                rows = range(first, first + _ROWS), block[:, :CODES].unbind(0), moments_of(block).unbind(0)
                self._vacant = list(zip(*rows, strict=True))[::-1]
            row, codes, moments = self._vacant.pop()
            accumulate(values, codes, moments)
        return DeviceSketch(self, row)

    def add_many(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch] | None:
        """Measure several tensors of one type as they are now, in one launch where Triton is there; under `Unseen`.

        Args:
            tensors: Plain and contiguous, of one floating-point type of 16 bits or more, each with an element at least.

        Returns:
            What will give each sketch; None where the batch was sent meanwhile, by another thread.

        Raises:
            CapturingError: A CUDA graph is being captured.
        """
        kernel = kernel_for(self.device)
        if kernel is None or len(tensors) == 1:
            with self._lock:
                found = [self.add(Values(tensor, 1, 0)) for tensor in tensors]
            return None if None in found else [sketch for sketch in found if sketch is not None]
        if self._edge.is_capturing():
            raise CapturingError
        sizes = np.array([tensor.numel() for tensor in tensors])
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        numbers, is_aligned = np.arange(len(tensors)), addresses % 16 == 0
        with self._lock, on(self.device):
            if self.is_sent:
                return None
            first, block = self._new_block(len(tensors))
            for aligned in (True, False):
                of = np.flatnonzero(is_aligned == aligned)
                if of.size:
                    table = kernel.runs_of(sizes[of], addresses[of], numbers[of], tensors[0].itemsize)
                    runs = self._edge.to_device(table, self.device)
                    try:
                        kernel.accumulate_runs(tensors[0], runs, block, aligned)
                    except Exception as error:
                        give_up(kernel, error)
                        return self.add_many(tensors)
        return [DeviceSketch(self, first + index) for index in range(len(tensors))]

    def tally(self, values: torch.Tensor, sides: tuple[int, int, int], slopes: Slopes | None) -> DeviceColumns | None:
        """Tally units as they are now, in one launch; see `unit_kernel.tally_positions`. Call it under `Unseen`.

        Args:
            values: On the device of the batch, as `Devices.can_tally` asks for.
            sides: How many samples, units and positions it has, in the order in which they lie.
            slopes: Where the nonlinearity is flat; without it, only ranges are found.

        Returns:
            What will give `FIELDS` columns; None where the batch was sent meanwhile, by another thread.

        Raises:
            CapturingError: A CUDA graph is being captured.
            UnmeasurableError: The kernel could not be launched, and will not be asked for again.
        """
        kernel = self._unit_kernel()
        with self._lock, on(self.device):
            if self.is_sent:
                return None
            samples, units, positions = sides
            number, first, out = self._columns.take(FIELDS, units)
            with launching(kernel):
                if positions == 1:
                    kernel.tally_units(values, samples, units, slopes, out)
                else:
                    kernel.tally_positions(values, samples, units, positions, slopes, out)
        return DeviceColumns(self, number, first, units)

    def find_rows(self, gradients: Sequence[torch.Tensor]) -> list[DeviceColumns] | None:
        """Find which rows of several gradients of one type are not zero, in one launch; under `Unseen`.

        Args:
            gradients: On the device of the batch, as `Devices.can_find_rows` asks for.

        Returns:
            What will give a number for each row of each; None where the batch was sent meanwhile, by another thread.

        Raises:
            CapturingError: A CUDA graph is being captured.
            UnmeasurableError: The kernel could not be launched, and will not be asked for again.
        """
        kernel = self._unit_kernel()
        rows = np.array([len(gradient) for gradient in gradients])
        lengths = np.array([gradient.numel() for gradient in gradients]) // rows
        addresses = np.array([gradient.data_ptr() for gradient in gradients])
        table = kernel.row_table(addresses, rows, lengths, gradients[0].itemsize)
        with self._lock, on(self.device):
            if self.is_sent:
                return None
            number, first, out = self._columns.take(1, int(rows.sum()))
            on_device = self._edge.to_device(table, self.device)
            with launching(kernel):
                kernel.find_rows(gradients[0], on_device, out[0])
        ends = np.cumsum(rows)
        found = DeviceColumns(self, number, first, int(ends[-1]))
        return [found.part(int(end - count), int(count)) for end, count in zip(ends, rows, strict=True)]

    @property
    def memory(self) -> list[torch.Tensor]:
        """All blocks, of rows and of columns."""
        return [*self.blocks, *self._columns.blocks]

    @property
    def is_full(self) -> bool:
        """Whether it is time to send it."""
        return self._used + self._columns.size // WIDTH >= _MOST_ROWS

    @property
    def is_there(self) -> bool:
        """Whether the copy has arrived."""
        done = self._done  # whoever asks for the sketches forgets it
        return self.is_sent and (done is None or done.query())

    def send(self) -> None:
        """Start the copy to the host; nothing is added from then on, and nothing waits."""
        with self._lock:
            if self.is_sent:
                return
            self.is_sent = True
            blocks = self.memory
            if not blocks:
                return
            self._shapes = [tuple(block.shape) for block in self._columns.blocks]
            try:
                with Unseen(), on(self.device):
                    self._edge.collects(self)
                    everything = torch.cat([block.view(torch.int64).view(-1) for block in blocks])
                    self._host, self._done = self._edge.to_host(everything, self._edge.mark())
            except Exception as error:  # whoever asks for a sketch is to know why there is none
                self._failure = error
            self.blocks.clear()
            self._columns.blocks.clear()
            self._vacant.clear()

    def found(self) -> Sketches:
        """The sketches of all rows; waits until the copy is there, and starts it where that was not done.

        Raises:
            Exception: The copy could not be started.
        """
        found = self._found
        if found is not None:
            return found
        self.send()
        done = self._done
        if done is not None:
            done.synchronize()  # without the lock, for which the training thread might wait
        with self._lock:
            if self._found is None:
                if self._failure is not None:
                    raise self._failure
                assert self._host is not None
                rows = self._used * WIDTH
                columns = self._host[rows:].numpy().copy()  # the memory that it came in is pinned, which is dear
                ends = np.cumsum([math.prod(shape) for shape in self._shapes])[:-1].tolist()
                parts = np.split(columns.view(np.float64), ends) if self._shapes else []
                self._found_columns = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
                # Last, since who finds it there looks at the columns without the lock.
                self._found = sketches_of_rows(self._host[:rows].view(self._used, WIDTH))
                self._host = self._done = None
            return self._found

    def columns(self, number: int) -> npt.NDArray[np.float64]:
        """A block of columns, of shape (fields, columns); waits until the copy is there.

        Raises:
            Exception: The copy could not be started.
        """
        self.found()
        return self._found_columns[number]

    def _unit_kernel(self) -> Any:
        """The module with the kernels of units, where one may be launched now."""
        if self._edge.is_capturing():
            raise CapturingError
        kernel = unit_kernel_for(self.device)
        if kernel is None:  # given up since it was asked for
            raise UnmeasurableError(GIVEN_UP)
        return kernel

    def _new_block(self, rows: int) -> tuple[int, torch.Tensor]:
        """A block of accumulators of nothing, behind those there are, and the number of its first row."""
        block = torch.zeros((rows, WIDTH), dtype=torch.int64, device=self.device)
        moments = moments_of(block)
        for column, value in enumerate(NEW_MOMENTS[3:], 3):
            moments[:, column].fill_(value)
        with self._lock:
            first = self._used
            self.blocks.append(block)
            self._used += rows
        return first, block


class DeviceSketch:
    """The sketch of a tensor on a device, on its way to the host."""

    __slots__ = ("group", "index")

    def __init__(self, batch: DeviceBatch, row: int) -> None:
        self.group = batch
        """Those that travel with it."""
        self.index = row
        """Its row among them."""

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        return self.group.is_there

    def sketch(self) -> Sketch:
        """The sketch; waits until the copy is there."""
        return self.group.found()[self.index]

    def place(self) -> tuple[Sketches, int]:
        """The sketches that came with this one, and its place among them; waits until the copy is there."""
        return self.group.found(), self.index
