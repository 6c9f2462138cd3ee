"""The buffer: sketches and tallies of the step that goes on, and the records of the last steps."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from instrument.capture.names import Site
from instrument.measure.columns import Sketches
from instrument.measure.device import LateNumber
from instrument.measure.histogram import FloatArray
from instrument.measure.pending import Pending, Together
from instrument.measure.sketch import Sketch
from instrument.measure.units import DeviceTally, UnitTally, merge_tallies
from instrument.record.packing import SketchStore
from instrument.record.tags import tag_of

__all__ = ["Buffer", "StepRecord", "Traits"]

MERGE_AFTER = 8
"""Sketches or tallies of one site that are kept apart before they are merged: micro-batches must not pile up."""


NO_UNITS: Mapping[str, UnitTally] = MappingProxyType({})


class _Tallies(Mapping[str, UnitTally]):
    """Tallies of one step, merged when they are asked for: those on a device are waited for then, by whoever asks."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Mapping[str, list[UnitTally | DeviceTally]]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> UnitTally:
        merged = merge_tallies(self._parts[name])
        self._parts[name] = [merged]
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def without(self, names: Iterable[str]) -> _Tallies:
        """Those of other names."""
        left_out = frozenset(names)
        return _Tallies({name: parts for name, parts in self._parts.items() if name not in left_out})

    def beside(self, others: Mapping[str, UnitTally]) -> _Tallies:
        """These and others of the same step."""
        earlier = others._parts if isinstance(others, _Tallies) else {}
        return _Tallies({**earlier, **self._parts})


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
        sketches: Mapping[str, Sketch | Pending],
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

    def statistics(self) -> FloatArray:
        """The statistics of all sketches, worked out once; see `statistics_of`.

        Returns:
            Float64 of shape (sketches, `COLUMNS`), in the order of the record.
        """
        return self._sketches.statistics()

    def columns(self) -> Sketches:
        """All sketches as columns, in the order of the record."""
        return self._sketches.columns()

    def pack(self) -> None:
        """Keep the sketches in little memory from now on, here and in every record that shares them."""
        self._sketches.pack()

    def joined(self, later: StepRecord) -> StepRecord:
        """This record with what a later one of the same step adds to it."""
        units = later.units.beside(self.units) if isinstance(later.units, _Tallies) else {**self.units, **later.units}
        sketches = {**self._sketches.as_they_are(), **later._sketches.as_they_are()}
        traits = {**self.traits, **later.traits}
        return StepRecord(self.step, sketches, later.wall_time, later.skipped, units, traits=traits)

    def without(self, earlier: StepRecord) -> StepRecord:
        """What this record has more than an earlier one of the same step."""
        units = self.units.without(earlier.units) if isinstance(self.units, _Tallies) else self.units
        sketches = {tag: sketch for tag, sketch in self._sketches.as_they_are().items() if tag not in earlier}
        traits = {tag: found for tag, found in self.traits.items() if tag not in earlier}
        return StepRecord(self.step, sketches, self.wall_time, self.skipped, units, traits=traits)

    def __repr__(self) -> str:
        return f"StepRecord(step={self.step}, {len(self)} sketches)"


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
        self._parts: dict[Site, Sketch | Pending | list[Sketch | Pending]] = {}
        # Most sites have one sketch a step: a list for each would keep the garbage collector busy.
        self._units: dict[str, list[UnitTally | DeviceTally]] = {}

    def open(self, step: int) -> None:
        """Begin to collect a step, or go on with it."""
        if self.step is None:
            self._wall_time = time.time()
            self.skipped = False
        self.step = step

    def add(self, site: Site, sketch: Sketch | Pending) -> None:
        """Add a sketch to the step; sketches of one site are merged."""
        parts = self._parts.get(site)
        if parts is None:
            self._parts[site] = sketch
            return
        if not isinstance(parts, list):
            parts = self._parts[site] = [parts]
        parts.append(sketch)
        if len(parts) > MERGE_AFTER and (together := Together(parts)).is_there:
            parts[:] = [together.sketch()]

    def add_units(self, name: str, tally: UnitTally | DeviceTally) -> None:
        """Add a tally of a module's units to the step; tallies of one name are merged."""
        parts = self._units.setdefault(name, [])
        parts.append(tally)
        if len(parts) > MERGE_AFTER and not any(isinstance(part, DeviceTally) for part in parts):
            parts[:] = [merge_tallies(parts)]

    def units(self) -> tuple[str, ...]:
        """Names of which the step has a tally."""
        return tuple(self._units)

    def samples_of(self, name: str) -> int:
        """How many samples the step has of a module's units, as far as that is known without waiting."""
        return sum(tally.samples for tally in self._units.get(name, ()) if isinstance(tally, UnitTally))

    def divide(self, site: Site, scale: float | LateNumber) -> None:
        """Note that the sketches of a site are those of its values divided by a scale."""
        traits = self.traits.get(site)
        if traits is not None:
            self.traits[site] = traits._replace(scale=scale)

    def discard(self, site: Site) -> None:
        """Forget what the step has of this site."""
        self._parts.pop(site, None)
        if site.kind == "gradients":
            self._units.pop(site.name, None)

    def has(self, site: Site) -> bool:
        """Whether the step has a sketch of this site."""
        return site in self._parts

    def drop(self) -> None:
        """Forget what was collected of the step."""
        self.step = None
        self._parts.clear()
        self._units.clear()

    def close(self) -> StepRecord | None:
        """End the step and keep its record.

        Where the last record is of the same step, because a second optimizer came late, the new sketches join
        it.

        Returns:
            What is new and is to be written, or None where nothing was collected.
        """
        step, parts, units = self.step, self._parts, _Tallies(self._units)
        self.step, self._parts, self._units = None, {}, {}
        if step is None or not parts:
            return None
        sketches = SketchStore({_known_tag(site): _merged(found) for site, found in parts.items()})
        known = self.traits
        traits = {_known_tag(site): known[site] for site in parts if site in known}
        record = StepRecord(step, sketches, self._wall_time, self.skipped, units, traits=traits)
        newest = self.history[-1] if self.history else None
        if newest is not None and newest.traits == traits:
            record.traits = newest.traits  # for the history to have them once
        if newest is not None and newest.step == step:
            record = record.without(newest)
            self.history[-1] = newest.joined(record)
        else:
            if newest is not None:
                newest.units = NO_UNITS  # they are large; whoever judges units has a record of its own
            self.history.append(StepRecord(step, sketches, self._wall_time, self.skipped, units, traits=record.traits))
        return record if len(record) else None


_known_tag = functools.lru_cache(maxsize=65_536)(tag_of)
"""The tags of sites come again each step."""


def _merged(parts: Sketch | Pending | list[Sketch | Pending]) -> Sketch | Pending:
    """The parts of one site as one, which is made when it is asked for."""
    if not isinstance(parts, list):
        return parts
    return Together(parts)
