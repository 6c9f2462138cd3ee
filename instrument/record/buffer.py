"""The buffer: sketches of the step that goes on, and the records of the last steps."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Mapping

from instrument.capture.names import Site
from instrument.measure.batch import Later
from instrument.measure.sketch import Sketch, merge_all
from instrument.record.tags import tag_of

__all__ = ["Buffer", "StepRecord"]

MERGE_AFTER = 8
"""Sketches of one site that are kept apart before they are merged: micro-batches must not pile up."""


class StepRecord(Mapping[str, Sketch]):
    """All sketches of one sampled step: a mapping from tag to `Sketch`, in the order of execution.

    Args:
        step: Number of the step, from 0.
        sketches: Tag to sketch, or to what will give it when the record is read.
        wall_time: Seconds since 1970 at which the step ended.
        skipped: Whether the optimizer left the parameters as they were, because a gradient scaler found Inf.

    Example:
        >>> from instrument import measure
        >>> import torch
        >>> record = StepRecord(3, {"Gradients/weight": measure(torch.ones(2))}, 0.0)
        >>> record.step, record["Gradients/weight"].mean
        (3, 1.0)
    """

    __slots__ = ("_sketches", "skipped", "step", "wall_time")

    def __init__(
        self, step: int, sketches: Mapping[str, Sketch | Later], wall_time: float, skipped: bool = False
    ) -> None:
        self.step = step
        self.skipped = skipped
        self.wall_time = wall_time
        self._sketches = dict(sketches)

    def __getitem__(self, tag: str) -> Sketch:
        found = self._sketches[tag]
        if isinstance(found, Later):
            found = self._sketches[tag] = found.sketch()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    def joined(self, sketches: Mapping[str, Sketch | Later], wall_time: float, skipped: bool) -> StepRecord:
        """This record with more sketches."""
        return StepRecord(self.step, {**self._sketches, **sketches}, wall_time, skipped)

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
        self._wall_time = 0.0
        self._parts: dict[Site, Sketch | Later | list[Sketch | Later]] = {}
        # Most sites have one sketch a step: a list for each would keep the garbage collector busy.

    def open(self, step: int) -> None:
        """Begin to collect a step, or go on with it."""
        if self.step is None:
            self._wall_time = time.time()
            self.skipped = False
        self.step = step

    def add(self, site: Site, sketch: Sketch | Later) -> None:
        """Add a sketch to the step; sketches of one site are merged."""
        parts = self._parts.get(site)
        if parts is None:
            self._parts[site] = sketch
            return
        if not isinstance(parts, list):
            parts = self._parts[site] = [parts]
        parts.append(sketch)
        if len(parts) > MERGE_AFTER:
            parts[:] = [_merged(parts)]

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
        sketches = {_known_tag(site): _merged(found) for site, found in parts.items()}
        if self.history and self.history[-1].step == step:
            earlier = self.history.pop()
            sketches = {tag: sketch for tag, sketch in sketches.items() if tag not in earlier}
            self.history.append(earlier.joined(sketches, self._wall_time, self.skipped))
        else:
            self.history.append(StepRecord(step, sketches, self._wall_time, self.skipped))
        return StepRecord(step, sketches, self._wall_time, self.skipped) if sketches else None


_known_tag = functools.lru_cache(maxsize=65_536)(tag_of)
"""The tags of sites come again each step."""


def _merged(parts: Sketch | Later | list[Sketch | Later]) -> Sketch | Later:
    """The parts of one site as one; a part that is alone may wait on."""
    if not isinstance(parts, list):
        return parts
    return merge_all(part.sketch() if isinstance(part, Later) else part for part in parts)
