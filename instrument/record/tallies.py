"""The tallies of one step, each a number until somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from instrument.measure.groups import Group
from instrument.measure.histogram import IntArray
from instrument.measure.pending import PLACES, Source
from instrument.measure.units import DeviceTally, LateTally, Ranges, Rows, UnitTally, merge_tallies

__all__ = ["NO_UNITS", "SideBySide", "Tallies", "Tally", "group_at"]

Tally: TypeAlias = "UnitTally | DeviceTally | LateTally"

NO_UNITS: Mapping[str, UnitTally] = MappingProxyType({})


class SideBySide(NamedTuple):
    """Tallies that stand side by side: names, and what was seen of them on as many samples each."""

    ranges: list[tuple[tuple[str, ...], Ranges]]
    """Modules of which the range alone is known."""

    rows: list[tuple[tuple[str, ...], Rows]]
    """Gradients of which either no row or every row is zero."""


_Columns = TypeVar("_Columns", Ranges, Rows)


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

    def together(self) -> SideBySide:
        """Those that were made together and are followed together."""
        names, parts = list(self._parts), list(self._parts.values())
        if not set(map(type, parts)) <= {int}:
            names = [name for name, part in self._parts.items() if type(part) is int]
            parts = [part for part in parts if type(part) is int]
        sources, numbers = np.divmod(np.array(parts, np.int64), PLACES)
        ranges: list[tuple[IntArray, Ranges]] = []
        rows: list[tuple[IntArray, Rows]] = []
        for source in dict.fromkeys(sources.tolist()):
            of_source = np.flatnonzero(sources == source)
            wanted = numbers[of_source]
            if (wanted[1:] > wanted[:-1]).all():
                (range_places, seen), (row_places, uniform) = group_at(source * PLACES, self._sources).together(wanted)
                ranges.append((of_source[range_places], seen))
                rows.append((of_source[row_places], uniform))
        return SideBySide(
            [(_named(names, places), seen) for places, seen in _by_samples(ranges, Ranges)],
            [(_named(names, places), seen) for places, seen in _by_samples(rows, Rows)],
        )

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


def _by_samples(
    parts: Sequence[tuple[IntArray, _Columns]], kind: type[_Columns]
) -> Iterator[tuple[IntArray, _Columns]]:
    """Places and what was seen there, of all parts, by the number of samples."""
    if parts:
        places, seen = np.concatenate([places for places, _ in parts]), kind.joined([seen for _, seen in parts])
        sizes = np.unique(seen.samples)
        for size in sizes:
            rows = np.flatnonzero(seen.samples == size)
            yield places[rows], seen.take(rows)


def _named(names: Sequence[str], places: IntArray) -> tuple[str, ...]:
    return tuple([names[place] for place in places.tolist()])


def group_at(place: int, sources: Sequence[Source]) -> Group:
    """The group that makes the tally of a place."""
    group = sources[place // PLACES]
    assert isinstance(group, Group)
    return group


def _loose_tally(parts: int | Tally | list[Tally], sources: Sequence[Source]) -> Tally | list[Tally]:
    """What will give a tally, without the sources."""
    return group_at(parts, sources).late(parts % PLACES) if isinstance(parts, int) else parts
