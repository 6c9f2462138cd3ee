"""Many tensors measured together: one call for all of them instead of a dozen for each."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch

from instrument.errors import InstrumentError
from instrument.measure import native
from instrument.measure.columns import Sketches
from instrument.measure.custom_op import measure
from instrument.measure.device import Devices, edge_for, is_plain
from instrument.measure.groups import ArrivingGroup, GatheredGroup, Group, Later
from instrument.measure.parallel import PART, WORTHWHILE, each
from instrument.measure.pending import ALONE, Pending, gathered
from instrument.measure.sketch import Sketch
from instrument.measure.small import GROUP, small, small_together
from instrument.measure.tensors import readable
from instrument.torch_private import Unseen, can_hide, is_asked_unseen

__all__ = ["Batch", "Column", "measure_later", "measure_many"]


_NOT_LAUNCHED = InstrumentError("a tensor on a device has not been measured")
"""Keeps the place of a tensor on a device until the launch that it waits for."""

_MOST_TOGETHER = 1024
"""Tensors on a GPU that one launch measures; their rows of accumulators are 34 MB."""

_MOST_ELEMENTS = 1 << 25
"""Elements of them, where they are made for us alone and held until the launch, as a gradient divided by its scale is;
a launch for each such part of a large model's gradients would take more time than it measures."""


def measure_many(tensors: Iterable[torch.Tensor]) -> list[Sketch | Exception]:
    """Measure several tensors; small ones together, for a few microseconds each.

    Args:
        tensors: As for `measure`. They may be made one by one: large ones are not held, on a GPU few of them.

    Returns:
        For each tensor its sketch, which is that of `measure`, or the exception that `measure` raises.

    Example:
        >>> import torch
        >>> [sketch.count for sketch in measure_many([torch.ones(3), torch.zeros(2)])]
        [3, 2]
    """
    return [_found(item) for item in measure_later(tensors, are_made_for_us=True)]


def _found(item: Sketch | Pending | Exception) -> Sketch | Exception:
    if isinstance(item, (Sketch, Exception)):
        return item
    try:
        return item.sketch()
    except Exception as error:
        return error


class Column(Sequence["Sketch | Pending | Exception"]):
    """What `measure_later` found of each tensor: its sketch, or what will give it, or what went wrong.

    Small tensors are places in a group, and an object for each is made when somebody asks for it alone.
    """

    __slots__ = ("groups", "items")

    def __init__(self) -> None:
        self.items: list[int | Sketch | Pending | Exception] = []
        """The same, of those measured together the number of the group times `GROUP`, and the place in it."""
        self.groups: list[Group] = []
        """Those that are measured together."""

    @overload
    def __getitem__(self, index: int) -> Sketch | Pending | Exception: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sketch | Pending | Exception]: ...
    def __getitem__(self, index: int | slice) -> Sketch | Pending | Exception | list[Sketch | Pending | Exception]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        item = self.items[index]
        return Later(self.groups[item // GROUP], item % GROUP) if isinstance(item, int) else item

    def __len__(self) -> int:
        return len(self.items)

    def add_group(self, group: Group) -> range:
        """Take a group in; what stands for each of its tensors in `items`, where it is to be put."""
        first = len(self.groups) * GROUP
        self.groups.append(group)
        return range(first, first + len(group))

    @property
    def held(self) -> int:
        """Bytes of values that wait to be measured, roughly."""
        return sum(group.held for group in self.groups)

    def failures(self) -> Iterator[tuple[int, Exception]]:
        """Places of the tensors that could not be measured, and why."""
        if set(map(type, self.items)) == {int}:  # as it is of a step of small tensors
            return iter(())
        return ((place, item) for place, item in enumerate(self.items) if isinstance(item, Exception))

    def item(self, place: int) -> Sketch | Pending:
        """The sketch at a place, or what will give it.

        Raises:
            Exception: It could not be measured.
        """
        found = self[place]
        if isinstance(found, Exception):
            raise found
        return found

    def sketches(self) -> Sketches:
        """The sketches of all; in the place of what could not be measured stands that of nothing.

        Raises:
            Exception: What went wrong when they were measured.
        """
        return gathered(self.items, self.groups, GROUP)


def measure_later(
    tensors: Iterable[torch.Tensor],
    sample_above: int = 0,
    devices: Devices | None = None,
    are_made_for_us: bool = False,
    column: Column | None = None,
) -> Column:
    """Measure several tensors as they are now; small ones are copied, for a microsecond each, and measured on demand.

    Args:
        tensors: As for `measure`. On the CPU large ones are not held; on a GPU they are until the launch.
        sample_above: As for `measure`.
        devices: Where those on a GPU wait until they are sent; without it, until they are asked for.
        are_made_for_us: Whether nobody else holds the tensors; those on a GPU then wait for few others.
        column: Where what is found is added; it has that of each tensor before the next one is asked for. Without it, a
            new one.

    Returns:
        For each tensor its sketch, or what will give it, or the exception that `measure` raises.

    Example:
        >>> import torch
        >>> ones = torch.ones(3)
        >>> (item,) = measure_later([ones])
        >>> ones.zero_(), item.sketch().mean
        (tensor([0., 0., 0.]), 1.0)
    """
    column = column if column is not None else Column()
    found, every_group = column.items, column.groups
    groups: dict[torch.dtype, tuple[GatheredGroup, int]] = {}
    devices = devices if devices is not None else Devices()
    waiting: dict[tuple[torch.device, torch.dtype], _Waiting] = {}
    hides = can_hide()
    with Unseen():
        if hides and isinstance(tensors, Sequence) and _are_taken_together(tensors, column, sample_above):
            return column
        try:
            for tensor in tensors:
                try:
                    size, address = small(tensor) if hides else (0, 0)
                    if size:
                        group, first = groups.get(tensor.dtype, (None, 0))
                        place = group.add(tensor, size, address) if group is not None and not group.is_full else None
                        while group is None or place is None:
                            if group is not None:
                                group.copy()
                            group, first = groups[tensor.dtype] = GatheredGroup(), len(every_group) * GROUP
                            every_group.append(group)
                            place = group.add(tensor, size, address)
                        found.append(first + place)
                    elif is_plain(tensor):
                        together = waiting.setdefault((tensor.device, tensor.dtype), _Waiting())
                        together.add(len(found), tensor)
                        found.append(_NOT_LAUNCHED)
                        if len(together) >= _MOST_TOGETHER or (are_made_for_us and together.elements >= _MOST_ELEMENTS):
                            together.launch(devices, found)
                    else:
                        found.append(_measure_large(tensor, sample_above, devices))
                except Exception as error:
                    found.append(error)
            for together in waiting.values():
                together.launch(devices, found)
        finally:  # where the tensors could not be made, those before are somebody else's again
            for group, _ in groups.values():
                group.copy()
    return column


def _are_taken_together(tensors: Sequence[torch.Tensor], column: Column, sample_above: int) -> bool:
    """Measure tensors that are there at the same time and alike, for half a microsecond each; whether that was done.

    One by one the questions whether each is small took 2 us, and to take it in another.
    """
    try:
        known = small_together(tensors)
    except Exception:  # one of them cannot be asked; it tells why when it is by itself
        known = None
    if known is None:
        return False
    sizes, addresses = known
    if all(sizes):
        for group in GatheredGroup.of(tensors, sizes, addresses):
            column.items += column.add_group(group)
        return True
    is_small = list(map(bool, sizes))
    together = list(itertools.compress(tensors, is_small))
    addresses = list(itertools.compress(addresses, is_small))
    places: list[int] = []
    for group in GatheredGroup.of(together, list(filter(None, sizes)), addresses):
        places += column.add_group(group)
    rest = iter(places)
    large = iter(_measured(list(itertools.compress(tensors, map(operator.not_, is_small))), sample_above))
    column.items += [next(rest) if is_one else next(large) for is_one in is_small]
    return True


def _measured(tensors: Sequence[torch.Tensor], sample_above: int) -> Sequence[Sketch | Exception]:
    """Measure plain tensors on the CPU that are not small, in several threads where that is worthwhile."""

    def sketch_of(tensor: torch.Tensor) -> Sketch | Exception:
        try:
            return measure(tensor, sample_above)
        except Exception as error:
            return error

    # A larger one is measured in several threads itself; for a smaller one, and in NumPy, they would wait for each
    # other's interpreter lock: 400 tensors of 30,000 elements took 1.5 times as long, of 60,000 0.7.
    are_shared = [native.is_there() and native.SHORT < tensor.numel() <= PART for tensor in tensors]
    shared = list(itertools.compress(tensors, are_shared))
    found = iter(each(sketch_of, shared, sum(tensor.numel() for tensor in shared) // WORTHWHILE))
    return [next(found) if is_one else sketch_of(tensor) for tensor, is_one in zip(tensors, are_shared, strict=True)]


class _Waiting:
    """Tensors of one device and type that wait for the launch that measures them all."""

    __slots__ = ("_places", "_tensors", "elements")

    def __init__(self) -> None:
        self.elements = 0
        """How many elements they have in all."""
        self._tensors: list[torch.Tensor] = []
        self._places: list[int] = []

    def add(self, place: int, tensor: torch.Tensor) -> None:
        """Take a tensor in, and the place where what will give its sketch belongs."""
        self._tensors.append(tensor)
        self._places.append(place)
        self.elements += tensor.numel()

    def __len__(self) -> int:
        return len(self._tensors)

    def launch(self, devices: Devices, found: list[int | Sketch | Pending | Exception]) -> None:
        """Measure what waits, and put what will give the sketches into their places."""
        if not self._tensors:
            return
        try:
            sketches: Sequence[Pending | Exception] = devices.add_many(self._tensors)
        except Exception as error:
            sketches = [error] * len(self._tensors)
        for place, sketch in zip(self._places, sketches, strict=True):
            found[place] = sketch
        self._tensors, self._places, self.elements = [], [], 0


def _measure_large(tensor: torch.Tensor, sample_above: int, devices: Devices) -> Sketch | Pending:
    """Measure a tensor now, or where it lies; call it under `Unseen`."""
    if edge_for(tensor.device) is not None and can_hide():
        return devices.add(readable(tensor))
    return measure(tensor, sample_above)


class Batch:
    """Takes tensors of any kind as they come; small ones are copied and measured together when one is asked for.

    Tensors may be added from several threads.

    Args:
        sample_above: As for `measure`.

    Example:
        >>> import torch
        >>> batch = Batch()
        >>> first, second = batch.add(torch.ones(3)), batch.add(torch.zeros(2))
        >>> first.sketch().mean, second.sketch().count
        (1.0, 2)
    """

    def __init__(self, sample_above: int = 0) -> None:
        self.devices = Devices()
        """Where what lies on GPUs waits until the batch is cut."""
        self._sample_above = sample_above
        self._groups: dict[torch.dtype, ArrivingGroup] = {}
        self._came: dict[torch.dtype, int] = {}
        """Elements that came of each type since the last cut, in groups that are full;"""
        self._expected: dict[torch.dtype, int] = {}
        """and those that came between the last two cuts."""

    def add(self, tensor: torch.Tensor) -> Sketch | Pending:
        """Measure a tensor as it is now, at once or later.

        Args:
            tensor: As for `measure`.

        Returns:
            The sketch, or what will give it.

        Raises:
            UnmeasurableError: As for `measure`.
        """
        found, place = self.put(tensor)
        return found.item(place) if isinstance(found, ArrivingGroup) else found

    def put(self, tensor: torch.Tensor) -> tuple[Sketch | Pending | ArrivingGroup, int]:
        """The same without an object for a small tensor: the group that it is measured with, and its place there.

        Args:
            tensor: As for `measure`.

        Returns:
            The sketch, or what will give it, and `ALONE`; or group and place.

        Raises:
            UnmeasurableError: As for `measure`.
        """
        if is_asked_unseen():
            size, address = small(tensor)
            group = self._groups.get(tensor.dtype) if address else None
            place = group.add(tensor, size, address, may_grow=False) if group is not None else None
            if group is not None and place is not None:
                return group, place
        with Unseen():
            size, address = small(tensor) if can_hide() else (0, 0)
            if not size:
                return _measure_large(tensor, self._sample_above, self.devices), ALONE
            group = self._groups.get(tensor.dtype)
            place = group.add(tensor, size, address) if group is not None else None
            while group is None or place is None:
                came = self._came.get(tensor.dtype, 0) + (group.size if group is not None else 0)
                self._came[tensor.dtype] = came
                group = ArrivingGroup(tensor.dtype, self._expected.get(tensor.dtype, 0) - came)
                place = group.add(tensor, size, address)
                self._groups[tensor.dtype] = group  # only now may other threads add to it
        return group, place

    def cut(self) -> None:
        """Measure what comes apart from what came, so that whoever measures that holds up nobody who adds.

        What lies on GPUs begins its way to the host.
        """
        groups, self._groups, came, self._came = self._groups, {}, self._came, {}
        self._expected = {dtype: came.get(dtype, 0) + group.size for dtype, group in groups.items()}
        self.devices.send()
