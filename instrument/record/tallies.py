"""The tallies of one step, each a number until somebody asks for it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from instrument.measure.groups import Group
from instrument.measure.pending import PLACES, Source
from instrument.measure.units import DeviceTally, LateTally, Ranges, UnitTally, merge_tallies

__all__ = ["NO_UNITS", "Tallies", "Tally", "group_at"]

Tally: TypeAlias = "UnitTally | DeviceTally | LateTally"

NO_UNITS: Mapping[str, UnitTally] = MappingProxyType({})


class Tallies(Mapping[str, UnitTally]):
    """Tallies of one step, merged when they are asked for: those on a device are waited for then, by whoever asks."""

    __slots__ = ("_parts", "_sources")

    def __init__(self, parts: Mapping[str, int | Tally | list[Tally]], sources: Sequence[Source] = ()) -> None:
        self._parts = dict(parts)
        self._sources = sources

    def __getitem__(self, name: str) -> UnitTally:
        parts = self._parts[name]
        if isinstance(parts, UnitTally):
            return parts
        if isinstance(parts, int):
            return group_at(parts, self._sources).made(parts % PLACES)
        found = merge_tallies(parts if isinstance(parts, list) else (parts,))
        self._parts[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def ranges(self) -> list[tuple[tuple[str, ...], Ranges]]:
        """Those of ranges alone that were made together: names and ranges, by the number of samples."""
        groups: dict[int, tuple[list[str], list[int]]] = {}
        for name, parts in self._parts.items():
            if type(parts) is int:
                names, numbers = groups.setdefault(parts // PLACES, ([], []))
                names.append(name)
                numbers.append(parts % PLACES)
        every: list[str] = []
        found: list[Ranges] = []
        for source, (names, numbers) in groups.items():
            if all(map(operator.lt, numbers, numbers[1:])):
                places, ranges = group_at(source * PLACES, self._sources).ranges(numbers)
                every += (names[place] for place in places)
                found.append(ranges)
        if not every:
            return []
        together = Ranges.joined(found)
        sizes = np.unique(together.samples)
        if sizes.size == 1:
            return [(tuple(every), together)]
        rows = (np.flatnonzero(together.samples == size) for size in sizes)
        return [(tuple(every[row] for row in each), together.take(each)) for each in rows]

    def without(self, names: Iterable[str]) -> Tallies:
        """Those of other names."""
        left_out = frozenset(names)
        kept = {name: parts for name, parts in self._parts.items() if name not in left_out}
        return Tallies(kept, self._sources)

    def beside(self, others: Mapping[str, UnitTally]) -> Tallies:
        """These and others of the same step."""
        earlier = others.loose() if isinstance(others, Tallies) else {}
        return Tallies({**earlier, **self.loose()})

    def loose(self) -> dict[str, Tally | list[Tally]]:
        """Name to tally, or to what will give it."""
        return {name: _loose_tally(parts, self._sources) for name, parts in self._parts.items()}


def group_at(place: int, sources: Sequence[Source]) -> Group:
    """The group that makes the tally of a place."""
    group = sources[place // PLACES]
    assert isinstance(group, Group)
    return group


def _loose_tally(parts: int | Tally | list[Tally], sources: Sequence[Source]) -> Tally | list[Tally]:
    """What will give a tally, without the sources."""
    return group_at(parts, sources).late(parts % PLACES) if isinstance(parts, int) else parts
