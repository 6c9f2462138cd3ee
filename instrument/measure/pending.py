"""Sketches that are not made yet: whoever asks for one makes it, or waits for the device that does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from instrument.measure.columns import Sketches
from instrument.measure.device import LateNumber
from instrument.measure.sketch import Sketch, merge_all

__all__ = ["Divided", "Pending", "Together", "gathered"]


class Pending(Protocol):
    """A sketch that is not made yet."""

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait for a device."""

    def sketch(self) -> Sketch:
        """The sketch; whoever asks makes it, or waits for it."""

    @property
    def group(self) -> object | None:
        """What this sketch is made with others by, if it is."""

    @property
    def index(self) -> int:
        """Its number in the group."""

    def place(self) -> tuple[Sketches, int] | None:
        """The sketches that this one is made with, where there are such, and its place among them."""


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

    group = None
    index = 0

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

    group = None
    index = 0

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


def gathered(items: Iterable[Sketch | Pending]) -> Sketches:
    """Sketches as columns, whether made already or not; what was measured together is taken over as it is.

    Args:
        items: The sketches, or what will give them.
    """
    parts: list[Sketches] = []
    alone: list[Sketch] = []
    source: Sketches | None = None
    group: object | None = None
    start = end = 0
    for item in items:
        # By far the most follow the one before in its group: to ask each for its place took ten times as long.
        if group is not None and not isinstance(item, Sketch) and item.group is group and item.index == end:
            end += 1
            continue
        place = None if isinstance(item, Sketch) else item.place()
        if source is not None:
            parts.append(source.part(start, end))
            source = group = None
        if place is None:
            alone.append(item if isinstance(item, Sketch) else item.sketch())
            continue
        if alone:
            parts.append(Sketches.of(alone))
            alone = []
        source, start = place
        end = start + 1
        group = None if isinstance(item, Sketch) else item.group
    if source is not None:
        parts.append(source.part(start, end))
    if alone:
        parts.append(Sketches.of(alone))
    return Sketches.joined(parts)
