"""The edge of a device: what only the real one can do, in one place, so that tests can put a stand-in there."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from instrument.errors import UnmeasurableError
from instrument.measure.histogram import IntArray

if TYPE_CHECKING:
    from instrument.measure.device.batch import DeviceBatch

__all__ = ["CapturingError", "CudaEdge", "Done", "Edge", "edge_for", "is_capturing"]


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

    def to_host(self, tensor: torch.Tensor, made: Done) -> tuple[torch.Tensor, Done]:
        """Start to copy a tensor to the host once it is made; gives the copy and what tells when it is there."""

    def to_device(self, numbers: IntArray, device: torch.device) -> torch.Tensor:
        """Whole numbers on a device, without a wait."""

    def stream(self, device: torch.device) -> Hashable:
        """What work that is launched now is queued in."""

    def collects(self, batch: DeviceBatch) -> None:
        """The current stream is about to read what that of a batch wrote."""


class CudaEdge:
    """CUDA through `torch.cuda`."""

    def is_capturing(self) -> bool:
        """Whether a graph is being captured on the current stream."""
        return bool(torch.cuda.is_current_stream_capturing())

    def to_host(self, tensor: torch.Tensor, made: Done) -> tuple[torch.Tensor, Done]:
        """Copy to pinned memory in a stream of our own, so that what is computed meanwhile does not wait for it."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream = _copying(tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(made)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return host, self.mark()

    def mark(self) -> Done:
        """An event on the current stream; whoever waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record()
        done: Done = event
        return done

    def to_device(self, numbers: IntArray, device: torch.device) -> torch.Tensor:
        """Copy from pinned memory, which does not wait."""
        return torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)

    def stream(self, device: torch.device) -> Hashable:
        """The current stream of the device."""
        stream: Hashable = torch.cuda.current_stream(device)
        return stream

    def collects(self, batch: DeviceBatch) -> None:
        """Have the current stream wait for that of the batch, whose memory it uses too."""
        stream = torch.cuda.current_stream(batch.device)
        if stream != batch.stream:
            stream.wait_stream(batch.stream)
            for block in batch.memory:
                block.record_stream(stream)


@functools.cache
def _copying(device: torch.device) -> Any:
    """The stream of ours in which copies of a device travel to the host."""
    return torch.cuda.Stream(device)


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
