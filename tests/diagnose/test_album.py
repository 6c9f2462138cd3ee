"""When the pictures of a run are drawn: at flush 1, 2, 4 ... and at the end; before that for a share of the time."""

from __future__ import annotations

import pytest

from instrument.config import Config
from instrument.diagnose.album import Album
from instrument.diagnose.allowance import SHARE, Allowance
from instrument.diagnose.doctor import Doctor, Examination
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import Reading
from instrument.diagnose.summaries import HEALTH_TAG, Summaries

from .statuses import status

AT_ONCE = 8
LAYERS = [f"layers.{number}" for number in range(2 * AT_ONCE + 3)]


class Clock:
    """Seconds of a training, of which each look at the clock takes one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def flush(album: Album, step: int, layers: list[str], seconds: float = 1e9, is_last: bool = False) -> list[str]:
    """Tags of the pictures that a flush draws after steps that took so long."""
    units = {name: status(name, [0.0, 0.5], step) for name in layers}
    return [value.tag for value in album.pictures(Reading(step, {}, units), is_last, seconds)]


def test_pictures_take_their_share_of_the_time_however_short_steps_are() -> None:
    """One is drawn at the first flush; then as many as fit into the share, and what is not used up is not saved up."""
    album, seconds = Album(Allowance(Clock())), 0.3 / SHARE
    drawn = [len(flush(album, step, LAYERS, seconds)) for step in range(40)]
    assert drawn[0] == 1 == max(drawn)
    assert sum(drawn) in (12, 13)  # of 1 s each, in 40 times 0.3 s
    for step in range(40, 63):
        flush(album, step, LAYERS[:1], 1e9)
    assert len(flush(album, 63, LAYERS, 0.0)) == 1  # all are due at flush 64


def tags(layers: list[str]) -> list[str]:
    return [f"Activations.unit_map/{name}" for name in layers]


def test_a_few_layers_are_drawn_at_flush_1_2_4_and_at_the_end() -> None:
    """Each picture shows the whole history, so that fewer and fewer tell all there is to see."""
    album, few = Album(Allowance(Clock())), LAYERS[:3]
    drawn = [flush(album, step, few) for step in range(9)]
    assert [bool(found) for found in drawn] == [True, True, False, True, False, False, False, True, False]
    assert drawn[0] == drawn[7] == tags(few)
    assert flush(album, 9, few, is_last=True) == tags(few)


def test_many_layers_are_drawn_by_and_by() -> None:
    """Those that were left come after the next flushes in their order, each once; at the end come all."""
    album = Album(Allowance(Clock()))
    drawn = [flush(album, step, LAYERS, AT_ONCE / SHARE) for step in range(8)]
    assert max(map(len, drawn)) == AT_ONCE
    waited = drawn[0] + drawn[1] + drawn[2]
    assert waited[: len(LAYERS)] == tags(LAYERS)
    assert waited[len(LAYERS) :] == tags(LAYERS)[: 3 * AT_ONCE - len(LAYERS)]  # due again since flush 2
    assert {tag for found in drawn[3:] for tag in found} == set(tags(LAYERS))
    assert sorted(flush(album, 8, LAYERS, is_last=True)) == sorted(tags(LAYERS))


def test_an_evaluation_between_two_steps_is_no_time_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pictures may take is a share of the steps since the last flush, however long the loop did something else."""
    told: list[float] = []

    def pictures(self: Album, reading: Reading, is_last: bool, seconds: float) -> list[object]:
        told.append(seconds)
        return []

    monkeypatch.setattr(Album, "pictures", pictures)
    summaries = Summaries(Doctor(Config(), None), Config(), lambda: ())
    for step, end in enumerate((100.0, 101.0, 102.0, 103.0, 163.0, 164.0, 166.0, 168.0)):
        summaries.of(Examination(Reading(step, {}, {}), (), is_flush=step in (0, 5, 7), wall_time=end))
    assert told == [0.0, 5.0, 2.0]


def written(monkeypatch: pytest.MonkeyPatch, news: dict[int, Finding]) -> list[int]:
    """Of 41 flushes of 60 s those with a health table, which takes a second; findings that are told at some of them."""
    monkeypatch.setattr("instrument.diagnose.summaries.Allowance", lambda: Allowance(Clock()))
    monkeypatch.setattr(Album, "pictures", lambda *arguments, **named: [])
    summaries = Summaries(Doctor(Config(), None), Config(), lambda: ())
    every = []
    for step in range(41):
        told = (news[step],) if step in news else ()
        reading = Reading(step, {}, {})
        every.append(summaries.of(Examination(reading, told, is_flush=True, is_last=step == 40, wall_time=60.0 * step)))
    return [step for step, values in enumerate(every) if f"{HEALTH_TAG}/text_summary" in {each.tag for each in values}]


def test_the_health_table_takes_its_share_and_comes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 flushes twelve or so have one, in 0.005 of the time, the first among them; the last one always."""
    found = written(monkeypatch, {})
    assert found[0] == 0
    assert found[-1] == 40
    assert 12 <= len(found[:-1]) <= 13


def test_the_health_table_comes_at_once_where_something_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the flush behind it, beside those that come anyway."""
    without = written(monkeypatch, {})
    step = next(step for step in range(41) if step not in without)
    finding = Finding(Level.WARN, "loss_spike", None, step, 2.0, 1.0, "loss", "the loss jumped.")
    assert written(monkeypatch, {step: finding}) == sorted([*without, step])
