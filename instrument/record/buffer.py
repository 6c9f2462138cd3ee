"""The buffer: sketches and tallies of the step that goes on, and the records of the last steps."""

from __future__ import annotations

import functools
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from instrument.capture.names import Site
from instrument.measure.batch import Column
from instrument.measure.columns import Sketches
from instrument.measure.device import LateNumber
from instrument.measure.groups import Group
from instrument.measure.histogram import FloatArray
from instrument.measure.pending import ALONE, PLACES, Pending, Source, Together
from instrument.measure.sketch import Sketch
from instrument.measure.units import DeviceTally, UnitTally, merge_tallies
from instrument.record.packing import SketchStore
from instrument.record.tags import tag_of
from instrument.record.tallies import NO_UNITS, Tallies, Tally, group_at

__all__ = ["Buffer", "StepRecord", "Traits"]

MERGE_AFTER = 8
"""Sketches or tallies of one site that are kept apart before they are merged: micro-batches must not pile up."""


class Traits(NamedTuple):
    """What a tensor is besides its values; of several that were merged, the last."""

    dtype: torch.dtype
    ndim: int
    requires_grad: bool
    scale: float | LateNumber = 1.0
    """What the values were multiplied by in the tensor: that of a gradient scaler."""


NO_TRAITS: Mapping[str, Traits] = MappingProxyType({})


class StepRecord(Mapping[str, Sketch]):
    """All sketches of one sampled step: a mapping from tag to `Sketch`, in the order of execution.

    Args:
        step: Number of the step, from 0.
        sketches: Tag to sketch, or to what will give it when the record is read.
        wall_time: Seconds since 1970 at which the step ended.
        skipped: Whether the optimizer left the parameters as they were, because a gradient scaler found Inf.
        units: Module name to what its units did; parameter name, where rows of its gradient tell that.
        traits: Tag to what the tensor is besides its values, where that is known.

    Example:
        >>> from instrument import measure
        >>> import torch
        >>> record = StepRecord(3, {"Gradients/weight": measure(torch.ones(2))}, 0.0)
        >>> record.step, record["Gradients/weight"].mean
        (3, 1.0)
    """

    __slots__ = ("_sketches", "skipped", "step", "traits", "units", "wall_time")

    def __init__(
        self,
        step: int,
        sketches: Mapping[str, Sketch | Pending] | SketchStore,
        wall_time: float,
        skipped: bool = False,
        units: Mapping[str, UnitTally] = NO_UNITS,
        *,
        traits: Mapping[str, Traits] = NO_TRAITS,
    ) -> None:
        self.step = step
        self.skipped = skipped
        self.wall_time = wall_time
        self.units = units
        self.traits = traits
        self._sketches = sketches if isinstance(sketches, SketchStore) else SketchStore(sketches)

    def __getitem__(self, tag: str) -> Sketch:
        return self._sketches[tag]

    def __contains__(self, tag: object) -> bool:
        return tag in self._sketches  # without making the sketch, for which a device would have to be waited for

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags; one tuple for all records of the same."""
        return self._sketches.tags

    def statistics(self) -> FloatArray:
        """The statistics of all sketches, worked out once; see `statistics_of`.

        Returns:
            Float64 of shape (sketches, `COLUMNS`), in the order of the record.
        """
        return self._sketches.statistics()

    def columns(self) -> Sketches:
        """All sketches as columns, in the order of the record."""
        return self._sketches.columns()

    @property
    def held(self) -> int:
        """Bytes of memory while it waits to be written, roughly."""
        return self._sketches.held

    def pack(self) -> None:
        """Keep the sketches in little memory from now on, here and in every record that shares them."""
        self._sketches.pack()

    def joined(self, later: StepRecord) -> StepRecord:
        """This record with what a later one of the same step adds to it."""
        units = later.units.beside(self.units) if isinstance(later.units, Tallies) else {**self.units, **later.units}
        sketches = {**self._sketches.as_they_are(), **later._sketches.as_they_are()}
        traits = {**self.traits, **later.traits}
        return StepRecord(self.step, sketches, later.wall_time, later.skipped, units, traits=traits)

    def without(self, earlier: StepRecord) -> StepRecord:
        """What this record has more than an earlier one of the same step."""
        units = self.units.without(earlier.units) if isinstance(self.units, Tallies) else self.units
        sketches = {tag: sketch for tag, sketch in self._sketches.as_they_are().items() if tag not in earlier}
        traits = {tag: found for tag, found in self.traits.items() if tag not in earlier}
        return StepRecord(self.step, sketches, self.wall_time, self.skipped, units, traits=traits)

    def __repr__(self) -> str:
        return f"StepRecord(step={self.step}, {len(self)} sketches)"


_ABOUT = operator.attrgetter("dtype", "ndim", "requires_grad")


class Buffer:
    """Collects the sketches of one step at a time and keeps the records of the last steps.

    Args:
        history: Records kept.
    """

    def __init__(self, history: int) -> None:
        self.history: deque[StepRecord] = deque(maxlen=history)
        """The last records, oldest first; the newest alone still has its tallies, which are the larger part."""
        self.step: int | None = None
        """Number of the step that is collected; None between steps."""
        self.skipped = False
        """Whether the optimizer skipped this step."""
        self.traits: dict[Site, Traits] = {}
        """What the tensor of each site was when it was last measured."""
        self._wall_time = 0.0
        self._parts: dict[Site, int | Sketch | Pending | list[Sketch | Pending]] = {}
        self._sources: list[Source] = []
        self._numbers: dict[int, int] = {}
        # Most sites have one sketch a step, and one tally: an object for each would keep the garbage collector busy.
        self._units: dict[str, int | Tally | list[Tally]] = {}
        self._has_new_traits = True
        self._noted: dict[str, tuple[list[Site], list[Any]]] = {}
        self._last_tags: tuple[str, ...] = ()

    def open(self, step: int) -> None:
        """Begin to collect a step, or go on with it."""
        if self.step is None:
            self._wall_time = time.time()
            self.skipped = False
        self.step = step

    def add(self, site: Site, sketch: Sketch | Pending | Source, place: int = ALONE) -> None:
        """Add a sketch to the step; sketches of one site are merged.

        Args:
            site: The site.
            sketch: The sketch, or what will give it; or a source that has it,
            place: at this place.
        """
        parts = self._joined(self._parts, site, sketch, place, lambda source, place: source.item(place))
        if len(parts) > MERGE_AFTER and (together := Together(parts)).is_there:
            parts[:] = [together.sketch()]

    def _joined(
        self, known: dict[Any, Any], key: object, found: Any, place: int, at: Callable[[Any, int], Any]
    ) -> list[Any]:
        """Add what was found to what is known under a key: the first by itself, or by its place in a source.

        Args:
            known: Sketches by site, or tallies by name.
            key: Site or name.
            found: What stands by itself; or a source,
            place: and a place in it.
            at: Gives what stands at a place of a source.

        Returns:
            All that is known under the key; empty for the first, which is not to be merged.
        """
        parts = known.get(key)
        if parts is None:
            known[key] = found if place == ALONE else PLACES * self._number_of(found) + place
            return []
        if not isinstance(parts, list):
            first = at(self._sources[parts // PLACES], parts % PLACES) if isinstance(parts, int) else parts
            parts = known[key] = [first]
        parts.append(found if place == ALONE else at(found, place))
        return parts

    def _number_of(self, source: Source) -> int:
        number = self._numbers.get(id(source))
        if number is None:
            number = self._numbers[id(source)] = len(self._sources)
            self._sources.append(source)
        return number

    def add_column(self, sites: Sequence[Site], column: Column) -> None:
        """Add the sketches of a column to the step, one a site; what could not be measured is left out."""
        first = PLACES * len(self._sources)
        found = dict(zip(sites, range(first, first + len(column)), strict=True))
        if len(found) == len(column) and self._parts.keys().isdisjoint(found) and not any(column.failures()):
            self._number_of(column)
            self._parts.update(found)
            return
        for place, (site, item) in enumerate(zip(sites, column.items, strict=True)):
            if not isinstance(item, Exception):
                self.add(site, column, place)

    def add_units(self, name: str, tally: Tally | Group, number: int = ALONE) -> None:
        """Add a tally of a module's units to the step; tallies of one name are merged.

        Args:
            name: Name of the module, or of the parameter whose gradient tells.
            tally: The tally, or what will give it; or the group that makes it,
            number: under this number.
        """
        parts = self._joined(self._units, name, tally, number, lambda group, number: group.late(number))
        if len(parts) > MERGE_AFTER and not any(isinstance(part, DeviceTally) for part in parts):
            parts[:] = [merge_tallies(parts)]

    def add_units_of(self, names: Sequence[str], group: Group, first: int) -> None:
        """The same of several modules; their tallies have numbers of a group that follow each other."""
        if self._units.keys().isdisjoint(names):
            start = PLACES * self._number_of(group) + first
            self._units.update(zip(names, range(start, start + len(names)), strict=True))
        else:
            for number, name in enumerate(names, first):
                self.add_units(name, group, number)

    def units(self) -> tuple[str, ...]:
        """Names of which the step has a tally."""
        return tuple(self._units)

    def samples_of(self, names: Iterable[str]) -> list[int]:
        """How many samples the step has of the units of each module, as far as that is known without waiting."""
        found = []
        for parts in map(self._units.get, names):
            if isinstance(parts, int):
                found.append(group_at(parts, self._sources).samples_of(parts % PLACES))
            elif parts is None:
                found.append(0)
            else:
                tallies = parts if isinstance(parts, list) else (parts,)
                found.append(sum(tally.samples for tally in tallies))
        return found

    def note(self, site: Site, tensor: torch.Tensor) -> None:
        """Note what the tensor of a site is besides its values; of most sites that is the same each step."""
        about = (*_ABOUT(tensor), 1.0)
        if self.traits.get(site) != about:
            self.traits[site] = Traits(*about)
            self._has_new_traits = True
            self._noted.clear()

    def note_all(self, sites: list[Site], tensors: Sequence[torch.Tensor]) -> None:
        """The same of many tensors, by one look at all of them where they are as they were."""
        kind, found = sites[0].kind if sites else "", (sites, list(map(_ABOUT, tensors)))
        if self._noted.get(kind) != found:
            for site, tensor in zip(sites, tensors, strict=True):
                self.note(site, tensor)
            self._noted[kind] = found

    def _traits(self, tags: tuple[str, ...], sites: Iterable[Site]) -> Mapping[str, Traits]:
        """Tag to traits; those of the last record where nothing is new, for the history to have them once."""
        newest = self.history[-1] if self.history else None
        if newest is not None and not self._has_new_traits and tags == self._last_tags:
            return newest.traits
        self._has_new_traits, self._last_tags = False, tags  # first: a thread of autograd may note something meanwhile
        known = self.traits
        found = {tag: known[site] for tag, site in zip(tags, sites, strict=True) if site in known}
        return newest.traits if newest is not None and newest.traits == found else found

    def divide(self, site: Site, scale: float | LateNumber) -> None:
        """Note that the sketches of a site are those of its values divided by a scale."""
        traits = self.traits.get(site)
        if traits is not None:
            self.traits[site] = traits._replace(scale=scale)
            self._has_new_traits = True
            self._noted.clear()

    def discard(self, site: Site) -> None:
        """Forget what the step has of this site."""
        self._parts.pop(site, None)
        if site.kind == "gradients":
            self._units.pop(site.name, None)

    @property
    def sites(self) -> KeysView[Site]:
        """The sites of which the step has a sketch, as it goes on."""
        return self._parts.keys()

    def drop(self) -> None:
        """Forget what was collected of the step."""
        self.step = None
        self._parts.clear()
        self._sources.clear()
        self._numbers.clear()
        self._units.clear()

    def close(self) -> StepRecord | None:
        """End the step and keep its record.

        Where the last record is of the same step, because a second optimizer came late, the new sketches join
        it.

        Returns:
            What is new and is to be written, or None where nothing was collected.
        """
        step, parts, sources = self.step, self._parts, self._sources
        units = Tallies(self._units, sources)
        self.step, self._parts, self._sources, self._numbers, self._units = None, {}, [], {}, {}
        if step is None or not parts:
            return None
        tags = _tags_of(tuple(parts))
        are_merged = list in set(map(type, parts.values()))
        own: Iterable[Any] = map(_merged, parts.values()) if are_merged else parts.values()
        sketches = SketchStore(dict(zip(tags, own, strict=True)), sources)
        newest = self.history[-1] if self.history else None
        record = StepRecord(step, sketches, self._wall_time, self.skipped, units, traits=self._traits(tags, parts))
        if newest is not None and newest.step == step:
            record = record.without(newest)
            self.history[-1] = newest.joined(record)
            self._last_tags = ()  # its traits are those of both parts
        else:
            if newest is not None:
                newest.units = NO_UNITS  # they are large; whoever judges units has a record of its own
            self.history.append(StepRecord(step, sketches, self._wall_time, self.skipped, units, traits=record.traits))
        return record if len(record) else None


@functools.lru_cache(maxsize=16)
def _tags_of(sites: tuple[Site, ...]) -> tuple[str, ...]:
    """The tags of sites, which come again each step."""
    return tuple(map(tag_of, sites))


def _merged(parts: int | Sketch | Pending | list[Sketch | Pending]) -> int | Sketch | Pending:
    """The parts of one site as one, which is made when it is asked for."""
    if not isinstance(parts, list):
        return parts
    return Together(parts)
