"""Small tensors of one type that are copied when they come, and measured at one time.

What shaped it, measured on one core with torch 2.13 and NumPy 2.4:

* a tensor of a thousand elements takes 8 us by itself where C measures it, and 31 in NumPy; together with a few hundred
  others it takes 2;
* what makes a tensor fit to be read by its address takes a dozen questions of 0.2 us each, so they are asked once;
* an object a tensor that lives until its step is written keeps the garbage collector busy, which then looks at all of
  torch's objects, 150 ms at a time: places in a group are numbers.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from instrument.measure import native, recycling
from instrument.measure.columns import Sketches
from instrument.measure.cpu import BLOCK, as_single
from instrument.measure.histogram import IntArray
from instrument.measure.segments import sketches_of
from instrument.measure.sketch import Sketch
from instrument.measure.slopes import Slopes
from instrument.measure.small import GROUP, SIZES, SMALL, TOGETHER, cut
from instrument.measure.units import LateTallies, LateTally, Ranges, Rows, UnitTally
from instrument.torch_private import Unseen, flattened

__all__ = ["ArrivingGroup", "GatheredGroup", "Group", "Later"]


class Later:
    """The sketch of a tensor that waits for others to be measured with."""

    __slots__ = ("group", "index")

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        """Those that it is measured with."""
        self.index = index
        """Its place among them."""

    @property
    def is_there(self) -> bool:
        """True: there is no device to wait for."""
        return True

    def place(self) -> tuple[Sketches, int]:
        """The sketches that this one is made with, and its place among them.

        Raises:
            Exception: What went wrong when they were measured.
        """
        return self.group.sketches(), self.index

    def sketch(self) -> Sketch:
        """The sketch; what waits is measured now unless that is done.

        Raises:
            Exception: What went wrong then.
        """
        return self.group.sketches()[self.index]


class Group(abc.ABC):
    """Small tensors of one type that are measured at one time, however they come."""

    __slots__ = ("_ends", "_found", "_lock", "_wanted", "is_full")

    def __init__(self) -> None:
        self.is_full = False
        """Whether no more is to be added."""
        # Whatever interrupts, each tensor is noted whole or not at all, since this alone says where values are.
        self._ends: list[int] = []
        """Where the values of each tensor end, behind those of all before."""
        self._found: Sketches | Exception | None = None
        self._wanted = LateTallies()
        self._lock = threading.RLock()  # a finalizer may ask in the middle of our own calls

    @property
    def size(self) -> int:
        """How many elements the tensors have in all."""
        return self._ends[-1] if self._ends else 0

    def _note(self, end: int) -> int:
        """Note a tensor whose values end there; returns its place."""
        ends = self._ends
        ends.append(end)
        self.is_full = end > TOGETHER - SMALL or len(ends) >= GROUP
        return len(ends) - 1

    def sketches(self) -> Sketches:
        """The sketches of the tensors, in the order in which they came.

        Raises:
            Exception: What went wrong, to everybody who asks.
        """
        if self._found is None:
            with self._lock, Unseen():
                if self._found is None:
                    self.is_full = True
                    found = self._measured()
                    if self._found is None:  # else a finalizer that ran meanwhile has asked as well
                        self._found = found
                    self._forget()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def _measured(self) -> Sketches | Exception:
        try:
            flat, lengths = self._values(), self._lengths()
            self._wanted.make(flat, np.cumsum(lengths) - lengths)
            return self._sketches_of(flat, lengths)
        except Exception as error:
            return error

    def __len__(self) -> int:
        return len(self._ends)

    def _lengths(self) -> IntArray:
        """How many elements each tensor has, of shape (tensors,)."""
        ends = np.array(self._ends, np.int64)
        return np.diff(ends, prepend=0)

    def _length(self, place: int) -> int:
        """How many elements the tensor at a place has."""
        return self._ends[place] - (self._ends[place - 1] if place else 0)

    @property
    def held(self) -> int:
        """Bytes of the values that wait to be measured, roughly."""
        return 4 * self.size if self._found is None else 0

    def item(self, place: int) -> Later:
        """What will give the sketch at a place."""
        return Later(self, place)

    def tally(self, place: int, shape: tuple[int, ...], axis: int, slopes: Slopes | None) -> int | None:
        """Have the units of a tensor tallied when it is measured.

        Args:
            place: Its place.
            shape: Its shape.
            axis: As for `instrument.measure.units.tally_units`.
            slopes: Likewise.

        Returns:
            The number under which `made` gives the tally; None where the tensor was measured already, or has another
            number of elements than when it was copied.
        """
        with self._lock:
            if self._found is not None or math.prod(shape) != self._length(place):
                return None
            return self._wanted.add(place, shape, axis, slopes)

    def rows(self, places: Sequence[int], rows: Sequence[int], samples: Sequence[int]) -> int | None:
        """Have the rows that are zero tallied of several gradients; see `instrument.measure.units.tally_rows`.

        Args:
            places: Their places.
            rows: How many rows each has.
            samples: How many samples each is of.

        Returns:
            The number of the first tally, behind which the others follow; None where all was measured already.
        """
        with self._lock:
            if self._found is not None:
                return None
            widths = [self._length(place) // count for place, count in zip(places, rows, strict=True)]
            return self._wanted.add_rows(places, rows, widths, samples)

    def late(self, number: int) -> LateTally:
        """What will give the tally of this number."""
        return LateTally(self, number)

    def samples_of(self, number: int) -> int:
        """How many samples the tally of this number is of."""
        return self._wanted.samples[number]

    def together(self, numbers: IntArray) -> tuple[tuple[IntArray, Ranges], tuple[IntArray, Rows]]:
        """Of which of some tallies ranges, or uniform rows, are all there is; what waits is measured now.

        Args:
            numbers: Numbers of tallies, rising.

        Returns:
            Places among those given, and ranges; and the same of rows.
        """
        if self._found is None:
            with contextlib.suppress(Exception):  # `made` raises for each
                self.sketches()
        return self._wanted.together(numbers)

    def made(self, number: int) -> UnitTally:
        """The tally of this number; what waits is measured now unless that is done.

        Raises:
            Exception: What went wrong, to everybody who asks.
        """
        if self._found is None:
            with contextlib.suppress(Exception):  # the sketches may have failed, and the tallies not
                self.sketches()
        made = self._wanted.found(number)
        if made is None and isinstance(self._found, Exception):
            made = self._found
        if isinstance(made, Exception):
            raise made
        assert made is not None
        return made

    @abc.abstractmethod
    def _values(self) -> torch.Tensor:
        """All values, one tensor behind the other, as often as this is asked for."""

    @abc.abstractmethod
    def _forget(self) -> None:
        """Let go of the values: they are measured."""

    def _sketches_of(self, flat: torch.Tensor, lengths: IntArray) -> Sketches:
        """The sketches of these values."""
        return _measured_together(flat, lengths)


class GatheredGroup(Group):
    """Tensors that are there at the same time: they are referred to until `copy`, which copies all in one call."""

    __slots__ = ("_addresses", "_flat", "_tensors")

    def __init__(self) -> None:
        super().__init__()
        self._flat: torch.Tensor | None = None
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], sizes: list[int], addresses: list[int]) -> Iterator[GatheredGroup]:
        """As many groups as it takes for tensors of which `small_together` told sizes and addresses, copied already."""
        for part, _ in cut(sizes):
            group = cls()
            group._tensors, group._addresses = [*tensors[part]], addresses[part]
            group._ends = list(itertools.accumulate(sizes[part]))
            group.copy()
            yield group

    def add(self, tensor: torch.Tensor, size: int, address: int) -> int | None:
        """Take a tensor in, of which `small` told size and address; returns its place, None where all is measured."""
        self._tensors.append(tensor)
        self._addresses.append(address)
        place = self._note(self.size + size)
        return place if self._found is None else None

    def copy(self) -> None:
        """Copy the values, where that was not done, so that the tensors are needed no more; call it under `Unseen`."""
        self.is_full = True
        if self._flat is not None or self._found is not None:
            return
        many = len(self._ends)  # more may be here, where something has interrupted `add`
        del self._tensors[many:], self._addresses[many:]
        if native.is_there() and 0 not in self._addresses:
            self._flat = native.gathered(self._addresses, self._lengths(), self._tensors[0].dtype)
        else:
            self._flat = flattened(self._tensors)
        self._tensors, self._addresses = [], []

    def _values(self) -> torch.Tensor:
        if self._flat is None:
            self.copy()
        assert self._flat is not None
        return self._flat

    def _forget(self) -> None:
        self._flat = None


# `ctypes.memmove` itself gives the interpreter lock up, which costs as much as to copy 8 kB, and a wait besides where
# another thread takes it.
_copy = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class _Room(NamedTuple):
    """Memory for the values of a group, from one place among them up to another."""

    values: torch.Tensor
    address: int
    begin: int
    end: int


class ArrivingGroup(Group):
    """Tensors that come one by one, perhaps from several threads: each is copied at once.

    Memory is taken a block at a time, since a small network needs no more; the blocks are joined by whoever measures.

    Args:
        dtype: Their type.
        expected: How many elements will come, as far as that can be told.
    """

    __slots__ = ("_dtype", "_is_busy", "_itemsize", "_rooms")

    def __init__(self, dtype: torch.dtype, expected: int = 0) -> None:
        super().__init__()
        self._dtype = dtype
        self._itemsize = SIZES[dtype]
        self._is_busy = False
        self._rooms = [self._room(0, min(-(-expected // BLOCK) * BLOCK, TOGETHER))]
        """One behind the other; empty once everything is measured."""

    def _room(self, begin: int, elements: int = BLOCK) -> _Room:
        """Memory for so many elements, at least for a block, from a place on."""
        elements = max(elements, BLOCK)
        values = torch.empty(elements, dtype=self._dtype)
        return _Room(values, values.data_ptr(), begin, begin + elements)

    def add(self, tensor: torch.Tensor, size: int, address: int, may_grow: bool = True) -> int | None:
        """Copy a tensor of which `small` told size and address.

        Args:
            tensor: The tensor.
            size: Its size.
            address: Its address; where it has none, call this under `Unseen`.
            may_grow: Whether memory may be taken for it, which is to be done under `Unseen`.

        Returns:
            Its place; None where the group is full or measured already, or would have to grow.
        """
        with self._lock:
            rooms = self._rooms
            if self.is_full or not rooms or self._is_busy:
                return None
            self._is_busy = True  # a finalizer that adds a tensor in the middle of this takes another group
            try:
                start = self.size
                room = rooms[-1]
                if start + size > room.end:
                    if not may_grow:
                        return None
                    rooms.append(self._room(start))
                    room = rooms[-1]
                if address:
                    place = room.address + (start - room.begin) * self._itemsize
                    _copy(place, address, size * self._itemsize)
                else:
                    own = slice(start - room.begin, start - room.begin + size)
                    room.values[own].view(tensor.shape).copy_(tensor)
                # And one may have asked for what is there.
                return self._note(start + size) if self._found is None else None
            finally:
                self._is_busy = False

    def _values(self) -> torch.Tensor:
        rooms, lasts = self._rooms, [*(room.begin for room in self._rooms[1:]), self.size]
        parts = [room.values[: last - room.begin] for room, last in zip(rooms, lasts, strict=True)]
        return parts[0] if len(parts) == 1 else recycling.joined_tensors(parts)

    def _forget(self) -> None:
        self._rooms = []

    @property
    def held(self) -> int:
        """Bytes of the memory for values that wait to be measured."""
        return sum((room.end - room.begin) * self._itemsize for room in self._rooms)


def _measured_together(flat: torch.Tensor, lengths: IntArray) -> Sketches:
    """Sketches of values that stand one tensor behind the other."""
    if native.can_measure(flat):
        return native.sketches_of(flat, lengths)
    single, found, start = as_single(flat).numpy(), [], 0
    for part, size in cut(lengths.tolist(), BLOCK):
        found.append(sketches_of(single[start : start + size], lengths[part]))
        start += size
    return Sketches.joined(found)
