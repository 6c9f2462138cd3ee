"""Counts of codes, moments and sketches, in C; and which tensors can be read there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure import recycling
from instrument.measure.columns import FIELDS, Sketches, made
from instrument.measure.histogram import CODES, IntArray, spread
from instrument.measure.native.library import Rooms, functions, is_there
from instrument.measure.sketch import Sketch
from instrument.measure.tensors import PLAIN

__all__ = [
    "KINDS",
    "PATTERNS",
    "address_of",
    "can_measure",
    "can_read",
    "counts_of",
    "counts_of_array",
    "gathered",
    "patterns_of",
    "sketch_of",
    "sketches_of",
    "sketches_of_rows",
]

PATTERNS = 65_536
"""Patterns that 16 bits can have."""

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""Number of each type that can be read."""


class _Room:
    """Room for the sketch of one tensor, and where it lies: to ask an array takes a microsecond."""

    def __init__(self) -> None:
        self.codes, self.counts = np.empty(CODES, np.uint16), np.empty(CODES, np.int64)
        self.numbers = np.empty(len(FIELDS))
        self.places = self.codes.ctypes.data, self.counts.ctypes.data, self.numbers.ctypes.data


class _PatternRoom:
    """Room for the patterns of one tensor, 1.2 MB, of which all but a few pages stay as the system gave them."""

    def __init__(self) -> None:
        self.tables = np.zeros((2, PATTERNS), np.uint32)
        self.present, self.counts = np.empty(PATTERNS, np.uint16), np.empty(PATTERNS, np.int64)
        self.places = tuple(array.ctypes.data for array in (self.tables, self.present, self.counts))


_rooms = Rooms(_Room)
_pattern_rooms = Rooms(_PatternRoom)


def can_measure(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor on the CPU can be measured here: float32 or bfloat16, contiguous, not empty, all there."""
    return (
        is_there()
        and tensor.dtype in KINDS
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not tensor.is_neg()
        and address_of(tensor, tensor.numel() * tensor.itemsize) != 0
    )


def address_of(tensor: torch.Tensor, size: int) -> int:
    """Where the values of a contiguous tensor on the CPU lie; 0 where they have no memory, since its storage was freed.

    What lies at the start of a freed storage has no address. What lies behind the start has one all the same, and its
    storage is asked; which makes an object of Python that lives as long as the storage, so it is not done for all.

    Args:
        tensor: The tensor.
        size: Bytes of its values.
    """
    address, offset = tensor.data_ptr(), tensor.storage_offset()
    if offset and tensor.untyped_storage().nbytes() < offset * tensor.itemsize + size:
        return 0
    return address


def can_read(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any kind is a plain one that `can_measure` allows."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and can_measure(tensor)
    )


def counts_of(tensor: torch.Tensor, stride: int = 1) -> tuple[IntArray, list[float]]:
    """Counts of codes, and moments.

    Args:
        tensor: One that `can_measure` allows.
        stride: Every how many elements codes are counted, as if the others were spread alike; zeros, moments, and what
            lies near NaN and Inf, are of all.

    Returns:
        Int64 of shape (4096,), and count, sum, sum of squares, minimum and maximum of the finite values.
    """
    return _counts_at(tensor.data_ptr(), KINDS[tensor.dtype], tensor.numel(), stride)


def counts_of_array(values: npt.NDArray[np.float32], stride: int = 1) -> tuple[IntArray, list[float]]:
    """The same of float32 of shape (n,), contiguous, where `is_there`."""
    return _counts_at(values.ctypes.data, KINDS[torch.float32], values.size, stride)


def _counts_at(address: int, kind: int, size: int, stride: int) -> tuple[IntArray, list[float]]:
    # One array for each call: codes, those of a sample, moments and what the sample stands for.
    codes = np.zeros(CODES if stride == 1 else 2 * CODES, np.int64)
    found = np.array([0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0])
    place = codes.ctypes.data
    call = functions(size)
    call.accumulate(address, kind, size, stride, place, place + codes.nbytes // 2, found.ctypes.data)
    *moments, zeros, others = found.tolist()
    if stride == 1:
        return codes, moments
    sampled = spread(codes[CODES:], int(zeros), int(others))
    if sampled is None:  # it has none of those that are not zero
        return _counts_at(address, kind, size, 1)
    return codes[:CODES] + sampled, moments


def patterns_of(values: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint16], IntArray]:
    """Which patterns of 16 bits occur, and how often, where `is_there`.

    Args:
        values: The patterns, contiguous, less than 2**32 of them.

    Returns:
        The patterns in their order, each once, and their counts as int64.
    """
    room = _pattern_rooms.take()
    used = functions(values.size).patterns(values.ctypes.data, values.size, *room.places)
    found = room.present[:used].copy(), room.counts[:used].copy()
    _pattern_rooms.give_back(room)
    return found


def sketch_of(tensor: torch.Tensor) -> Sketch:
    """The sketch of one tensor.

    Args:
        tensor: One that `can_measure` allows, of less than 2**32 elements.
    """
    room, size = _rooms.take(), tensor.numel()
    call = functions(size)
    used = call.sketch(tensor.data_ptr(), KINDS[tensor.dtype], size, *room.places)
    sketch = made(room.codes[:used].copy(), room.counts[:used].copy(), room.numbers.tolist())
    _rooms.give_back(room)
    return sketch


def sketches_of(flat: torch.Tensor, lengths: IntArray) -> Sketches:
    """Sketches of values that stand one tensor behind the other.

    Args:
        flat: The values, of shape (n,); one that `can_measure` allows.
        lengths: How many of them each tensor has, at least 1: int64, contiguous.
    """
    start = flat.data_ptr(), KINDS[flat.dtype], lengths.ctypes.data, lengths.size
    return _filled(lengths.size, flat.numel(), functools.partial(functions().sketches, *start))


def sketches_of_rows(rows: IntArray) -> Sketches:
    """Sketches of rows of accumulators, where `is_there`.

    Args:
        rows: Int64 of shape (sketches, width), contiguous, with counts of codes and behind them five moments, in the
            bits of float64; see `instrument.measure.device.rows`.
    """
    many, width = rows.shape
    return _filled(many, many * CODES, functools.partial(functions(rows.size).rows, rows.ctypes.data, many, width))


def _filled(many: int, most: int, fill: Callable[..., int]) -> Sketches:
    """So many sketches, of `most` codes at most, by a function that fills their arrays and returns how many."""
    codes, counts = recycling.empty(most, np.uint16), recycling.empty(most, np.int64)
    ends: npt.NDArray[np.int64] = np.empty(many, np.int64)
    numbers = np.empty((many, len(FIELDS)))
    used = fill(*(array.ctypes.data for array in (codes, counts, ends, numbers)))
    return Sketches(recycling.copied(codes[:used]), recycling.copied(counts[:used]), ends, numbers)


def gathered(addresses: Sequence[int], lengths: IntArray, dtype: torch.dtype) -> torch.Tensor:
    """The values of contiguous tensors, one tensor behind the other.

    Args:
        addresses: Where the values of each begin; the tensors must live meanwhile.
        lengths: How many elements each has, int64 of shape (tensors,), contiguous.
        dtype: Their type.

    Returns:
        A new tensor of shape (n,).
    """
    flat = torch.empty(int(lengths.sum()), dtype=dtype)
    places, sizes = np.array(addresses, np.uint64), lengths * dtype.itemsize
    call = functions(flat.numel())
    call.gather(len(places), places.ctypes.data, sizes.ctypes.data, flat.data_ptr())
    return flat
