"""What is computed on a device and read on the host, when somebody asks for it."""

from __future__ import annotations

import torch

from instrument.measure.device.accumulating import on
from instrument.measure.device.edge import edge_for
from instrument.measure.device.rows import NEW_MOMENTS, sketches_of_rows
from instrument.measure.sketch import Sketch
from instrument.torch_private import Unseen

__all__ = ["LateNumber", "Marked", "RowSketch"]


class Marked:
    """A tensor that nobody changes any more, and a mark behind what computes it.

    Args:
        tensor: On any device.
    """

    __slots__ = ("_done", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        edge = edge_for(tensor.device)
        with on(tensor.device):
            self._done = edge.mark() if edge is not None else None

    @property
    def is_there(self) -> bool:
        """Whether it can be fetched without a wait for what computes it."""
        return self._done is None or self._done.query()

    def fetch(self) -> torch.Tensor:
        """The tensor on the host; waits for what computes it, and for nothing that the device was given later."""
        edge = edge_for(self._tensor.device)
        if edge is None or self._done is None:
            return self._tensor.cpu()
        with Unseen():
            host, done = edge.to_host(self._tensor, self._done)
        done.synchronize()
        return host


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
            for place, value in enumerate(NEW_MOMENTS):
                moments[place].fill_(value)

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        return self._marked.is_there

    def sketch(self) -> Sketch:
        """The sketch; waits for the device."""
        return sketches_of_rows(self._marked.fetch()[None])[0]

    def place(self) -> None:
        """None: it is made by itself."""
