"""What TensorBoard and the commands are given of an examination: scalars, texts and documents."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import text

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.album import Album
from instrument.diagnose.allowance import Allowance
from instrument.diagnose.doctor import Doctor, Examination
from instrument.diagnose.health import health_rows
from instrument.diagnose.layout import layout_value
from instrument.diagnose.readings import GUIDE, LOG10_RATIO, UPDATE_GUIDE, ParameterTraits, Reading
from instrument.diagnose.report import health_markdown
from instrument.diagnose.units import UnitStatus, encode
from instrument.record.documents import UNITS_TAG, WATCH_TAG, document, packed
from instrument.record.tags import tag_of

__all__ = ["EVENTS_TAG", "HEALTH_TAG", "Summaries"]

HEALTH_TAG = "health"
EVENTS_TAG = "health/events"

_ENDS_KEPT = 64
"""Steps whose usual length is that of those since the last flush, of which there may be thousands."""

_EVENTS_KEPT = 200
"""Lines of the log of events; each text holds them all, since TensorBoard shows a sample of the texts of a tag."""


class Summaries:
    """Turns examinations into values of events; used by one thread at a time.

    Args:
        doctor: Who made the examinations.
        config: The settings, which are written into the run.
        notices: Gives what could not be observed so far.
    """

    def __init__(self, doctor: Doctor, config: Config, notices: Callable[[], Sequence[str]]) -> None:
        self._doctor = doctor
        self._config = dataclasses.asdict(config)
        self._notices = notices
        self._events: list[str] = []
        self._told_of: dict[str, tuple[Any, ...]] = {}
        self._about: tuple[tuple[str, ...], Mapping[str, ParameterTraits]] | None = None
        self._album = Album()
        self._for_health = Allowance()
        self._has_news = False
        """Whether something was found, or not observed, since the last flush: the health table is to tell of it."""
        self._has_layout = False
        self._ends: deque[float] = deque(maxlen=_ENDS_KEPT)
        """When the last steps ended."""
        self._steps = 0
        """Steps since the last flush."""

    def of(self, examination: Examination) -> list[Summary.Value]:
        """The values of one examination, for an event of its step.

        Args:
            examination: What became of a record.

        Returns:
            Values; none where there is nothing new.
        """
        reading = examination.reading
        values = _derived(reading)
        self._ends.append(examination.wall_time)
        self._steps += 1
        if not self._has_layout:
            self._has_layout = True
            values.append(layout_value(self._config["kinds"]))
        lines = [f"**{found.level}** {_escaped(str(found).partition(' ')[2])}" for found in examination.told]
        lines += self._births_and_deaths(reading)
        if lines:
            self._has_news = True
            self._events = [*self._events, *lines][-_EVENTS_KEPT:]
            values.append(_text(EVENTS_TAG, "\n".join(f"* {line}" for line in self._events)))
        about = (tuple(self._notices()), reading.parameters)
        if about != self._about:
            self._has_news = True
            self._about = about
            values.append(document(WATCH_TAG, packed(self._watch(*about))))
        if examination.is_flush:
            values += _of_units(reading.units)
            seconds = self._seconds()
            self._for_health.earn(seconds)
            if self._has_news or examination.is_last:
                values.append(self._health(reading, about[0]))
            elif self._for_health.is_left:
                with self._for_health.spending():
                    values.append(self._health(reading, about[0]))
            self._has_news = False
            values += self._album.pictures(reading, is_last=examination.is_last, seconds=seconds)
            self._steps = 0
        return values

    def _health(self, reading: Reading, notices: Sequence[str]) -> Summary.Value:
        active = self._doctor.active()
        rows = health_rows(tuple(self._doctor.readings), reading.units, active)
        return _text(HEALTH_TAG, health_markdown(rows, active, notices))

    def _seconds(self) -> float:
        """What the steps since the last flush have taken, without an evaluation or a pause between two of them."""
        lengths = [later - earlier for earlier, later in itertools.pairwise(self._ends)]
        return statistics.median(lengths) * self._steps if lengths else 0.0

    def _watch(self, notices: Sequence[str], parameters: Mapping[str, ParameterTraits]) -> dict[str, Any]:
        return {
            "config": self._config,
            "notices": list(notices),
            "parameters": {name: list(traits) for name, traits in parameters.items()},
        }

    def _births_and_deaths(self, reading: Reading) -> list[str]:
        lines = []
        for name, status in reading.units.items():
            state = (status.windows, status.births, status.deaths)
            if (status.births or status.deaths) and self._told_of.get(name) != state:
                lines.append(
                    f"step {reading.step} `{name}`: {len(status.deaths)} units fell silent and {len(status.births)} "
                    f"came back since the window before; {len(status.dead)} of {status.units} are silent now"
                )
            self._told_of[name] = state
        return lines


def _derived(reading: Reading) -> list[Summary.Value]:
    values = [
        Summary.Value(tag=tag_of(Site(kind, name), statistic), simple_value=value)
        for (kind, statistic, name), value in reading.derived().items()
    ]
    if reading.has("updates", LOG10_RATIO):
        values.append(Summary.Value(tag=tag_of(Site("updates", GUIDE), LOG10_RATIO), simple_value=UPDATE_GUIDE))
    return values


def _of_units(units: Mapping[str, UnitStatus]) -> list[Summary.Value]:
    if not units:
        return []
    values = []
    for name, status in units.items():
        if status.units and status.verdict in ("ok", "dead"):
            dead = len(status.dead) / status.units
            values.append(Summary.Value(tag=tag_of(Site("activations", name), "dead_fraction"), simple_value=dead))
        if status.saturated and status.function is not None and status.samples:
            share = sum(status.saturated) / len(status.saturated)
            values.append(
                Summary.Value(tag=tag_of(Site("activations", name), "saturated_fraction"), simple_value=share)
            )
    return [*values, document(UNITS_TAG, encode(units))]


def _text(tag: str, markdown: str) -> Summary.Value:
    return text(tag, markdown).value[0]


def _escaped(line: str) -> str:
    """A line without what Markdown would take for marks: names are full of underscores and asterisks."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|" else letter for letter in line)
