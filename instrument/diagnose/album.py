"""The pictures of a run as it goes on: how often each unit fired through time, and scale through depth.

TensorBoard keeps ten pictures of a tag, the newest among them, so each shows the whole history. A picture takes some
10 ms to draw, whatever the step cost; so they are drawn at flush 1, 2, 4, 8 ... and at the end. Where that would take
more than a small share of the time of the training, they are drawn by and by, in the flushes that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tensorboard.compat.proto.summary_pb2 import Summary

from instrument.capture.names import Site
from instrument.diagnose.allowance import Allowance
from instrument.diagnose.figures import as_value, depth_profile
from instrument.diagnose.history import UnitHistory
from instrument.diagnose.readings import Reading
from instrument.record.tags import tag_of

__all__ = ["Album"]

PROFILES = {"activations": "rms of activations by depth", "gradients": "rms of gradients by depth"}
PROFILE_STATISTIC = "by_depth"
PROFILE_NAME = "rms"


class Album:
    """Remembers what the pictures of a run show, and draws them; used by one thread at a time.

    Args:
        allowance: What unit maps may take until the training is over.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self._allowance = allowance or Allowance()
        self._units = UnitHistory()
        self._first: dict[str, tuple[int, Mapping[str, float]]] = {}
        self._last: dict[str, tuple[int, Mapping[str, float]]] = {}
        self._flushes = 0
        self._due: dict[str, None] = {}

    def pictures(self, reading: Reading, is_last: bool, seconds: float = 0.0) -> list[Summary.Value]:
        """The pictures that are due after a flush.

        Args:
            reading: Of the flush.
            is_last: Whether the training is over.
            seconds: What the steps since the flush before have taken.

        Returns:
            Images; none where none is due.
        """
        if reading.units:
            self._units.add(reading.step, reading.units)
        for kind in PROFILES:
            if found := reading.column(kind, "rms"):
                self._first.setdefault(kind, (reading.step, found))
                self._last[kind] = (reading.step, found)
        self._flushes += 1
        is_due = is_last or not self._flushes & (self._flushes - 1)
        if is_due:
            self._due.update(dict.fromkeys(self._units.drawn))
        profiles = (self._profile(kind) for kind in self._last) if is_due else ()
        return [*(value for value in profiles if value is not None), *self._maps(is_last, seconds)]

    def _maps(self, is_last: bool, seconds: float) -> Iterator[Summary.Value]:
        """The unit maps that are due, all of them or as many as there is time for."""
        self._allowance.earn(seconds)
        for name in list(self._due):
            if not (self._allowance.is_left or is_last):
                return
            with self._allowance.spending():
                value = self._units.value(name)
            del self._due[name]
            yield value

    def _profile(self, kind: str) -> Summary.Value | None:
        first, then = self._first[kind]
        last, now = self._last[kind]
        names = [name for name in now if name in then]
        if len(names) < 2 or first == last:
            return None
        values = [then[name] for name in names], [now[name] for name in names]
        image = depth_profile(PROFILES[kind], names, *values, (first, last))
        return as_value(tag_of(Site(kind, PROFILE_NAME), PROFILE_STATISTIC), image)
