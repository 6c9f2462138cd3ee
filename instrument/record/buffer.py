"""The buffer: sketches of the step that goes on, and the records of the last steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from instrument.capture.names import Site
from instrument.measure.sketch import Sketch, merge_all
from instrument.record.tags import tag_of

__all__ = ["Buffer", "StepRecord", "Traits"]

MERGE_AFTER = 8
"""Sketches of one site that are kept apart before they are merged: micro-batches must not pile up."""


class Traits(NamedTuple):
    """What a tensor is besides its values; of several that were merged, the last."""

    dtype: torch.dtype
    ndim: int
    requires_grad: bool
    scale: float = 1.0
    """What the values were multiplied by in the tensor: that of a gradient scaler."""


NO_TRAITS: Mapping[str, Traits] = MappingProxyType({})


class StepRecord(Mapping[str, Sketch]):
    """All sketches of one sampled step: a mapping from tag to `Sketch`, in the order of execution.

    Args:
        step: Number of the step, from 0.
        sketches: Tag to sketch.
        wall_time: Seconds since 1970 at which the step ended.
        skipped: Whether the optimizer left the parameters as they were, because a gradient scaler found Inf.
        traits: Tag to what the tensor is besides its values, where that is known.

    Example:
        >>> from instrument import measure
        >>> import torch
        >>> record = StepRecord(3, {"Gradients/weight": measure(torch.ones(2))}, 0.0)
        >>> record.step, record["Gradients/weight"].mean
        (3, 1.0)
    """

    __slots__ = ("_sketches", "skipped", "step", "traits", "wall_time")

    def __init__(
        self,
        step: int,
        sketches: Mapping[str, Sketch],
        wall_time: float,
        skipped: bool = False,
        *,
        traits: Mapping[str, Traits] = NO_TRAITS,
    ) -> None:
        self.step = step
        self.skipped = skipped
        self.wall_time = wall_time
        self.traits = traits
        self._sketches = dict(sketches)

    def __getitem__(self, tag: str) -> Sketch:
        return self._sketches[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    def __repr__(self) -> str:
        return f"StepRecord(step={self.step}, {len(self)} sketches)"


class Buffer:
    """Collects the sketches of one step at a time and keeps the records of the last steps.

    Args:
        history: Records kept.
    """

    def __init__(self, history: int) -> None:
        self.history: deque[StepRecord] = deque(maxlen=history)
        """The last records, oldest first."""
        self.step: int | None = None
        """Number of the step that is collected; None between steps."""
        self.skipped = False
        """Whether the optimizer skipped this step."""
        self.traits: dict[Site, Traits] = {}
        """What the tensor of each site was when it was last measured."""
        self._wall_time = 0.0
        self._parts: dict[Site, list[Sketch]] = {}

    def open(self, step: int) -> None:
        """Begin to collect a step, or go on with it."""
        if self.step is None:
            self._wall_time = time.time()
            self.skipped = False
        self.step = step

    def add(self, site: Site, sketch: Sketch) -> None:
        """Add a sketch to the step; sketches of one site are merged."""
        parts = self._parts.setdefault(site, [])
        parts.append(sketch)
        if len(parts) > MERGE_AFTER:
            parts[:] = [merge_all(parts)]

    def divide(self, site: Site, scale: float) -> None:
        """Note that the sketches of a site are those of its values divided by a scale."""
        traits = self.traits.get(site)
        if traits is not None:
            self.traits[site] = traits._replace(scale=scale)

    def discard(self, site: Site) -> None:
        """Forget what the step has of this site."""
        self._parts.pop(site, None)

    def has(self, site: Site) -> bool:
        """Whether the step has a sketch of this site."""
        return site in self._parts

    def drop(self) -> None:
        """Forget what was collected of the step."""
        self.step = None
        self._parts.clear()

    def close(self) -> StepRecord | None:
        """End the step and keep its record.

        Where the last record is of the same step, because a second optimizer came late, the new sketches join
        it.

        Returns:
            What is new and is to be written, or None where nothing was collected.
        """
        step, parts = self.step, self._parts
        self.step, self._parts = None, {}
        if step is None or not parts:
            return None
        sketches = {tag_of(site): merge_all(sketches) for site, sketches in parts.items()}
        traits = {tag_of(site): self.traits[site] for site in parts if site in self.traits}
        if self.history and self.history[-1].step == step:
            earlier = self.history.pop()
            sketches = {tag: sketch for tag, sketch in sketches.items() if tag not in earlier}
            whole, known = {**earlier, **sketches}, {**earlier.traits, **traits}
            self.history.append(StepRecord(step, whole, self._wall_time, self.skipped, traits=known))
        else:
            self.history.append(StepRecord(step, sketches, self._wall_time, self.skipped, traits=traits))
        return StepRecord(step, sketches, self._wall_time, self.skipped, traits=traits) if sketches else None
