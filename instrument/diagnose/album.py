"""The pictures of a run as it goes on: how often each unit fired through time, and scale through depth.

TensorBoard keeps ten pictures of a tag, the newest among them, so each shows the whole history. A picture takes some
30 ms to draw, whatever the step cost; so they are drawn at flush 1, 2, 4, 8 ... and at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.summary_pb2 import Summary

from instrument.capture.names import Site
from instrument.diagnose.figures import as_value, depth_profile, unit_map
from instrument.diagnose.readings import Reading
from instrument.diagnose.units import UnitStatus
from instrument.record.tags import tag_of

__all__ = ["Album"]

MOST_COLUMNS = 512
"""Flushes that a picture shows; of more, every other one is given up."""

MOST_LAYERS = 64
"""Layers that have a unit map."""

PROFILES = {"activations": "rms of activations by depth", "gradients": "rms of gradients by depth"}
PROFILE_STATISTIC = "by_depth"
PROFILE_NAME = "all layers"


class Album:
    """Remembers what the pictures of a run show, and draws them; used by one thread at a time."""

    def __init__(self) -> None:
        self._rates: dict[str, list[tuple[int, npt.NDArray[np.float32]]]] = {}
        self._first: dict[str, tuple[int, Mapping[str, float]]] = {}
        self._last: dict[str, tuple[int, Mapping[str, float]]] = {}
        self._flushes = 0

    def pictures(self, reading: Reading, is_last: bool) -> list[Summary.Value]:
        """The pictures that are due after a flush.

        Args:
            reading: Of the flush.
            is_last: Whether the training is over.

        Returns:
            Images; none where none is due.
        """
        for name, status in list(reading.units.items())[:MOST_LAYERS]:
            self._remember(name, status, reading.step)
        self._flushes += 1
        is_due = is_last or self._flushes & (self._flushes - 1) == 0
        for kind in PROFILES:
            if found := reading.column(kind, "rms"):
                self._first.setdefault(kind, (reading.step, found))
                self._last[kind] = (reading.step, found)
        if not is_due:
            return []
        profiles = (self._profile(kind) for kind in self._last)
        maps = [self._map(name, columns) for name, columns in self._rates.items()]
        return [value for value in profiles if value is not None] + maps

    def _remember(self, name: str, status: UnitStatus, step: int) -> None:
        if status.function is None or not status.rate or status.verdict == "no-data":
            return
        columns = self._rates.setdefault(name, [])
        if columns and columns[-1][0] == step:
            return
        if columns and len(columns[0][1]) != len(status.rate):  # the layer was replaced by one of another width
            columns.clear()
        columns.append((step, np.array(status.rate, np.float32)))
        if len(columns) > MOST_COLUMNS:
            del columns[1::2]

    def _map(self, name: str, columns: list[tuple[int, npt.NDArray[np.float32]]]) -> Summary.Value:
        steps, rates = zip(*columns, strict=True)
        return as_value(tag_of(Site("activations", name), "unit_map"), unit_map(name, steps, np.stack(rates, axis=1)))

    def _profile(self, kind: str) -> Summary.Value | None:
        first, then = self._first[kind]
        last, now = self._last[kind]
        names = [name for name in now if name in then]
        if len(names) < 2 or first == last:
            return None
        values = [then[name] for name in names], [now[name] for name in names]
        image = depth_profile(PROFILES[kind], names, *values, (first, last))
        return as_value(tag_of(Site(kind, PROFILE_NAME), PROFILE_STATISTIC), image)
