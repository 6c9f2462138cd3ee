"""The numbers of a live step as the table that they came in: a tenth of the memory of a dictionary, and no copy.

As many readings are kept as any diagnostic looks back. As dictionaries they took 90 kB for each tensor, and to make one
for 1600 tensors took 5 ms a step; nine of ten of its numbers nobody ever asked for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.units import BoolArray
from instrument.record.statistics import COLUMNS
from instrument.record.tags import COUNTS, Tag, parse_tag

__all__ = ["Numbers"]

_NO_ROWS: IntArray = np.empty(0, np.intp)
_COUNTS = [place for place, statistic in enumerate(COLUMNS) if statistic in COUNTS]
_PLACES = {statistic: place for place, statistic in enumerate(COLUMNS)}


class _Layout:
    """What the rows of a table are; the same from step to step, and made once."""

    def __init__(self, tags: tuple[str, ...]) -> None:
        self.sites: list[tuple[str, str]] = []
        """Kind and name of each row."""
        self.names: dict[str, dict[str, int]] = {}
        """By kind: name to its place among those of the kind."""
        self.rows: dict[str, IntArray] = {}
        """By kind: the rows."""
        rows: dict[str, list[int]] = {}
        for row, tag in enumerate(tags):
            parsed = parse_tag(tag)
            assert parsed is not None
            self.sites.append((parsed.kind, parsed.name))
            rows.setdefault(parsed.kind, []).append(row)
        for kind, found in rows.items():
            self.rows[kind] = np.array(found, np.intp)
            self.names[kind] = {self.sites[row][1]: place for place, row in enumerate(found)}

    @functools.lru_cache(maxsize=16)  # noqa: B019  # layouts are few and kept anyway
    def rows_of(self, kind: str, names: tuple[str, ...]) -> IntArray:
        """The rows of some sites of a kind; -1 where there is none."""
        places, rows = self.names.get(kind, {}), self.rows.get(kind, _NO_ROWS)
        return np.array([rows[places[name]] if name in places else -1 for name in names], np.intp)


_layout_of = functools.lru_cache(maxsize=16)(_Layout)


class Numbers(Mapping[Tag, float]):
    """Every number of a step by its tag: those of a table, and further ones.

    What is NaN in the table is absent, and so is a count of zero, where its tensor has any finite value.

    Args:
        tags: Histogram tags of the rows.
        table: Float64 of shape (tags, `COLUMNS`), which is not changed.
        further: Of statistics that the table has not.

    Example:
        >>> table = np.array([[1.0, 0.0, 1.0, 2.0, 0.5, 0.0, 0.0]])
        >>> numbers = Numbers(("Gradients/w",), table, {Tag("gradients", "l2", "_global"): 3.0})
        >>> numbers[Tag("gradients", "abs_max", "w")], dict(numbers.column("gradients", "rms")), len(numbers)
        (2.0, {'w': 1.0}, 6)
    """

    def __init__(self, tags: tuple[str, ...], table: FloatArray, further: Mapping[Tag, float]) -> None:
        self._layout = _layout_of(tags)
        self._table = table
        self._further = dict(further)
        self._are_known: dict[tuple[str, str], bool] = {}

    def column(self, kind: str, statistic: str) -> Mapping[str, float]:
        """One statistic of every site of a kind: name to value, in the order of the rows."""
        place = _PLACES.get(statistic)
        if place is None:
            return {tag.name: value for tag, value in self._further.items() if tag[:2] == (kind, statistic)}
        rows = self._layout.rows.get(kind)
        if rows is None:
            return {}
        values = self._table[rows, place]
        names = self._layout.names[kind]
        is_known = ~np.isnan(values)
        if statistic in COUNTS:
            is_known &= (values > 0) | np.isnan(self._table[rows, 0])
        if is_known.all():
            return _Column(names, values)
        return dict(itertools.compress(zip(names, values.tolist(), strict=True), is_known.tolist()))

    def has(self, kind: str, statistic: str) -> bool:
        """Whether one statistic of any site of a kind is known; looked up once, since every later step asks again."""
        known = self._are_known.get((kind, statistic))
        if known is None:
            known = self._are_known[kind, statistic] = bool(self.column(kind, statistic))
        return known

    def sizes(self, kind: str, statistic: str, names: tuple[str, ...]) -> FloatArray:
        """One statistic of some sites of a kind, of shape (names,); zero where it is unknown."""
        rows = self._layout.rows_of(kind, names)
        if not len(self._table):
            return np.zeros(len(names))
        found = np.where(rows < 0, 0.0, self._table[rows, _PLACES[statistic]])
        return np.nan_to_num(found, nan=0.0, posinf=math.inf, neginf=-math.inf)

    @property
    def is_spoilt(self) -> bool:
        """Whether any tensor holds NaN or Inf."""
        return bool((self._table[:, _COUNTS] > 0).any())

    def rows(self, kind: str) -> IntArray:
        """The rows of a kind in the table."""
        return self._layout.rows.get(kind, _NO_ROWS)

    def above_zero(self, kind: str, statistics: Sequence[str]) -> Iterator[str]:
        """Names of the sites of a kind of which one of some statistics is above zero."""
        columns = self._table[self.rows(kind)][:, [_PLACES[statistic] for statistic in statistics]]
        is_above: BoolArray = np.logical_or.reduce(columns > 0, axis=1)
        return itertools.compress(self._layout.names.get(kind, ()), is_above.tolist())

    def further(self) -> Mapping[Tag, float]:
        """The numbers that are not of the table."""
        return self._further

    def __getitem__(self, tag: Tag) -> float:
        found = self._further.get(tag)
        if found is not None:
            return found
        kind, statistic, name = tag
        value = self.column(kind, statistic or "").get(name)
        if value is None:
            raise KeyError(tag)
        return value

    def __iter__(self) -> Iterator[Tag]:
        is_known = ~np.isnan(self._table)
        for statistic in COUNTS:
            place = _PLACES[statistic]
            is_known[:, place] &= (self._table[:, place] > 0) | ~is_known[:, 0]
        for (kind, name), known in zip(self._layout.sites, is_known.tolist(), strict=True):
            for statistic in itertools.compress(COLUMNS, known):
                yield Tag(kind, statistic, name)
        yield from self._further

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[Tag, float]:
        """Tag and number of everything."""
        table = self._table.tolist()
        numbers: dict[tuple[str, str | None, str], float] = {
            (kind, statistic, name): value
            for (kind, name), row in zip(self._layout.sites, table, strict=True)
            for statistic, value in zip(COLUMNS, row, strict=True)
        }
        return {tag: self._further[tag] if tag in self._further else numbers[tag] for tag in self}.items()


class _Column(Mapping[str, float]):
    """One statistic of every site of a kind."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: dict[str, int], values: FloatArray) -> None:
        self._names = names
        self._values = values

    def __getitem__(self, name: str) -> float:
        return float(self._values[self._names[name]])

    @overload
    def get(self, name: str, /) -> float | None: ...
    @overload
    def get(self, name: str, default: Any, /) -> Any: ...
    def get(self, name: str, default: Any = None, /) -> Any:
        """The value of a site; the general one of `Mapping` takes an exception for what lacks."""
        place = self._names.get(name)
        return default if place is None else float(self._values[place])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, float]:
        """Name and value of every site."""
        return dict(zip(self._names, self._values.tolist(), strict=True)).items()
