"""The batches that fill, of all devices and streams, and which tensors can be given to them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from instrument.measure.device.accumulating import FLOATS, unit_kernel_for
from instrument.measure.device.batch import DeviceBatch, DeviceSketch
from instrument.measure.device.columns import DeviceColumns
from instrument.measure.device.edge import edge_for
from instrument.measure.slopes import Slopes
from instrument.measure.tensors import PLAIN, Values
from instrument.torch_private import can_hide

__all__ = ["Devices", "is_plain"]

_TALLIED = FLOATS - {torch.float64}
"""Types of which units are tallied by a kernel: it compares with limits in float32."""


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
        while True:
            found = self._batch(values.tensor.device).add(values)
            if found is not None:
                return found

    def add_many(self, tensors: Sequence[torch.Tensor]) -> list[DeviceSketch]:
        """The same for several tensors of one type, on one device; see `DeviceBatch`."""
        while True:
            found = self._batch(tensors[0].device).add_many(tensors)
            if found is not None:
                return found

    def can_tally(self, tensor: torch.Tensor) -> bool:
        """Whether units of a tensor, as `whole` gives it, are tallied by `tally`; call it under `Unseen`."""
        return (
            tensor.dtype in _TALLIED
            and edge_for(tensor.device) is not None
            and unit_kernel_for(tensor.device) is not None
            and can_hide()
        )

    def tally(self, values: torch.Tensor, sides: tuple[int, int, int], slopes: Slopes | None) -> DeviceColumns:
        """Tally units as they are now, where they lie; see `DeviceBatch`."""
        while True:
            found = self._batch(values.device).tally(values, sides, slopes)
            if found is not None:
                return found

    def can_find_rows(self, gradient: torch.Tensor) -> bool:
        """Whether rows of a gradient are looked at by `find_rows`; call it under `Unseen`."""
        return is_plain(gradient) and unit_kernel_for(gradient.device) is not None

    def find_rows(self, gradients: Sequence[torch.Tensor]) -> list[DeviceColumns]:
        """Find which rows of gradients of one type, on one device, are not zero; see `DeviceBatch`."""
        while True:
            found = self._batch(gradients[0].device).find_rows(gradients)
            if found is not None:
                return found

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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a kernel can read a tensor on a device from its address, beside others; ask it under `Unseen`."""
    return (
        type(tensor) in PLAIN
        and edge_for(tensor.device) is not None
        and tensor.dtype in FLOATS
        and tensor.layout is torch.strided
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_nested
        and tensor.data_ptr() != 0  # its storage is freed
        and can_hide()
    )
