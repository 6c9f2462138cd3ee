"""Columns of accumulators for units, which a batch of rows carries along to the host."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["FIELDS", "Carrier", "Columns", "DeviceColumns"]

FIELDS = 6
"""Numbers of a unit: as `unit_kernel.tally_units` adds to them."""

_WIDTH = 8192
"""Columns of a block; what has more of them gets a block of its own."""


class Columns:
    """Blocks of columns on one device, and which of them are taken.

    Args:
        device: Where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks: list[torch.Tensor] = []
        """Float64, of shape (fields, columns)."""
        self.size = 0
        """Numbers that they have room for, 8 bytes each."""
        self._device = device
        self._free: dict[int, tuple[int, int]] = {}

    def take(self, fields: int, count: int) -> tuple[int, int, torch.Tensor]:
        """Columns that nobody has added to: a block's number, the first column, and a view of shape (fields, count).

        Args:
            fields: `FIELDS`, of which the first begins at +inf and the second at -inf, or 1; all else begins at zero.
            count: How many, at least 1.
        """
        room = count + count % 2  # so that what follows begins at 16 bytes
        number, first = self._free.get(fields, (-1, 0))
        if number < 0 or first + count > self.blocks[number].shape[1]:
            number, first = self._new_block(fields, max(_WIDTH, room)), 0
        self._free[fields] = number, first + room
        return number, first, self.blocks[number][:, first : first + count]

    def _new_block(self, fields: int, width: int) -> int:
        block = torch.zeros((fields, width), dtype=torch.float64, device=self._device)
        if fields == FIELDS:
            block[0].fill_(math.inf)
            block[1].fill_(-math.inf)
        self.blocks.append(block)
        self.size += block.numel()
        return len(self.blocks) - 1


class Carrier(Protocol):
    """Who brings blocks to the host."""

    @property
    def is_there(self) -> bool:
        """Whether they are there."""

    def columns(self, number: int) -> npt.NDArray[np.float64]:
        """A block, as float64 of shape (fields, columns); waits until it is there."""


class DeviceColumns:
    """Columns of a block, on their way to the host.

    Args:
        carrier: Who brings the block.
        number: Number of the block.
        first: The first column.
        count: How many.
    """

    __slots__ = ("_carrier", "_part")

    def __init__(self, carrier: Carrier, number: int, first: int, count: int) -> None:
        self._carrier = carrier
        self._part = number, first, count

    @property
    def is_there(self) -> bool:
        """Whether they can be had without a wait."""
        return self._carrier.is_there

    def fetch(self) -> npt.NDArray[Any]:
        """The columns, of shape (fields, count); waits until they are there."""
        number, first, count = self._part
        return self._carrier.columns(number)[:, first : first + count]

    def part(self, first: int, count: int) -> DeviceColumns:
        """Some of them."""
        number, start, _ = self._part
        return DeviceColumns(self._carrier, number, start + first, count)
