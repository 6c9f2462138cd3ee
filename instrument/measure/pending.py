"""Sketches that are not made yet: whoever asks for one makes it, or waits for the device that does."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from instrument.measure.columns import Sketches, runs_of
from instrument.measure.device import LateNumber
from instrument.measure.histogram import IntArray
from instrument.measure.sketch import Sketch, merge_all

__all__ = ["ALONE", "PLACES", "Divided", "Pending", "Source", "Together", "gathered"]

PLACES = 1 << 32
"""A place in one of several sources is the number of the source times this, and the place in it: a number is no object
that the garbage collector has to look at, and there is one for each tensor of a step."""

ALONE = -1
"""Stands where the place in a source stands, for what is in none."""


class Pending(Protocol):
    """A sketch that is not made yet."""

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait for a device."""

    def sketch(self) -> Sketch:
        """The sketch; whoever asks makes it, or waits for it."""

    def place(self) -> tuple[Sketches, int] | None:
        """The sketches that this one is made with, where there are such, and its place among them."""


class Source(Protocol):
    """Several sketches that are made together."""

    def sketches(self) -> Sketches:
        """All of them; whoever asks makes them, or waits for them."""

    def item(self, place: int) -> Sketch | Pending:
        """The one at a place."""

    @property
    def held(self) -> int:
        """Bytes of values that wait to be measured, roughly."""


class Divided:
    """A sketch of values divided by a positive number, of which one or both are not known yet.

    Args:
        item: The sketch, or what will give it.
        scale: The number.

    Example:
        >>> from instrument import measure
        >>> import torch
        >>> Divided(measure(torch.tensor([512.0])), 1024.0).sketch().max
        0.5
    """

    __slots__ = ("_item", "_scale")

    def __init__(self, item: Sketch | Pending, scale: float | LateNumber) -> None:
        self._item = item
        self._scale = scale

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        is_known = isinstance(self._scale, float) or self._scale.is_there
        return is_known and (isinstance(self._item, Sketch) or self._item.is_there)

    def sketch(self) -> Sketch:
        """The sketch."""
        found = self._item if isinstance(self._item, Sketch) else self._item.sketch()
        return found.divided(float(self._scale))

    def place(self) -> None:
        """None: it is made by itself."""


class Together:
    """Several sketches of one site, merged when they are asked for.

    Args:
        parts: One at least.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Iterable[Sketch | Pending]) -> None:
        self._parts = list(parts)

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        return all(isinstance(part, Sketch) or part.is_there for part in self._parts)

    def sketch(self) -> Sketch:
        """The sketch of all."""
        merged = merge_all(part if isinstance(part, Sketch) else part.sketch() for part in self._parts)
        self._parts = [merged]
        return merged

    def place(self) -> None:
        """None: it is made by itself."""


def gathered(
    items: Sequence[int | Sketch | Pending | Exception], sources: Sequence[Source] = (), stride: int = PLACES
) -> Sketches:
    """Sketches as columns, whether made already or not; what was measured together is taken over as it is.

    Args:
        items: The sketches, or what will give them, or their places in the sources; or why one could not be measured,
            in whose place stands the sketch of nothing.
        sources: Where the places are.
        stride: What the number of a source is multiplied by in a place.

    Raises:
        Exception: What went wrong when they were measured.
    """
    parts = _Parts()
    if set(map(type, items)) == {int}:  # a step of small tensors, and each part of it
        numbers, places, runs = _taken_apart(tuple(items), stride)
        if runs is not None:
            return Sketches.joined([sources[number].sketches().part(first, end) for number, first, end in runs])
        starts = np.zeros(len(sources), np.int64)
        for number in dict.fromkeys(numbers.tolist()):
            starts[number] = parts.start_of(sources[number].sketches())
        return parts.taken(starts[numbers] + places)
    order = np.empty(len(items), np.int64)
    alone: list[Sketch] = []
    alone_at: list[int] = []
    begins: dict[int, int] = {}
    for index, item in enumerate(items):
        if isinstance(item, Exception):
            item = Sketch.empty()
        if isinstance(item, int):
            number, place = divmod(item, stride)
            if number not in begins:  # to ask a source again may make all of its sketches again
                begins[number] = parts.start_of(sources[number].sketches())
            order[index] = begins[number] + place
            continue
        found = None if isinstance(item, Sketch) else item.place()
        if found is not None:
            order[index] = parts.start_of(found[0]) + found[1]
        else:
            alone_at.append(index)
            alone.append(item if isinstance(item, Sketch) else item.sketch())
    if alone:
        order[alone_at] = parts.start_of(Sketches.of(alone)) + np.arange(len(alone))
    return parts.taken(order)


@functools.lru_cache(maxsize=16)
def _taken_apart(items: tuple[int, ...], stride: int) -> tuple[IntArray, IntArray, list[tuple[int, int, int]] | None]:
    """Places in sources, which come again each step.

    Args:
        items: Number of the source times the stride, and the place in it.
        stride: How many places a source has, at most.

    Returns:
        Numbers; places; and, where they follow each other, numbers of sources with the first place and the end in each.
    """
    every = np.array(items, np.int64)
    numbers, places = np.divmod(every, stride)
    runs = runs_of(every)
    if runs is None:
        return numbers, places, None
    found = []
    for first, end in runs:
        while first < end:  # the last place of a full source and the first one of the next follow each other, too
            number = first // stride
            last = min(end, (number + 1) * stride)
            found.append((number, first - number * stride, last - number * stride))
            first = last
    return numbers, places, found


class _Parts:
    """Sketches one behind the other."""

    def __init__(self) -> None:
        self._found: list[Sketches] = []
        self._starts: dict[int, int] = {}
        self._size = 0

    def start_of(self, part: Sketches) -> int:
        """Where a part begins; it is added where it is new."""
        start = self._starts.get(id(part))
        if start is None:
            start = self._starts[id(part)] = self._size
            self._found.append(part)
            self._size += len(part)
        return start

    def taken(self, order: IntArray) -> Sketches:
        """Those at places, in their order."""
        runs = runs_of(order)
        if runs is None:
            return Sketches.joined(self._found).take(order)
        starts = list(self._starts.values())
        taken = []
        for first, end in runs:
            while first < end:
                number = bisect.bisect_right(starts, first) - 1
                part, start = self._found[number], starts[number]
                taken.append(part.part(first - start, min(end - start, len(part))))
                first = start + len(part)
        return Sketches.joined(taken)
