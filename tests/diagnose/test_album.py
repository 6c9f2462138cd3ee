"""When the pictures of a run are drawn: at flush 1, 2, 4 ... and at the end; before that for a share of the time."""

from __future__ import annotations

from instrument.diagnose.album import SHARE, Album
from instrument.diagnose.readings import Reading

from .statuses import status

AT_ONCE = 8
LAYERS = [f"layers.{number}" for number in range(2 * AT_ONCE + 3)]


class Clock:
    """Seconds of a training, in which somebody looks at the clock once a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def flush(album: Album, step: int, layers: list[str], is_last: bool = False) -> list[str]:
    """Tags of the pictures that a flush draws."""
    units = {name: status(name, [0.0, 0.5], step) for name in layers}
    return [value.tag for value in album.pictures(Reading(step, {}, units), is_last)]


def test_one_picture_is_drawn_however_short_steps_are() -> None:
    """A network whose steps take next to no time gets its pictures one a flush."""
    album = Album(Clock())
    assert [flush(album, step, LAYERS[:2]) for step in range(2)] == [tags(LAYERS[:1]), tags(LAYERS[1:2])]


def tags(layers: list[str]) -> list[str]:
    return [f"Activations.unit_map/{name}" for name in layers]


def test_a_few_layers_are_drawn_at_flush_1_2_4_and_at_the_end() -> None:
    """Each picture shows the whole history, so that fewer and fewer tell all there is to see."""
    clock, few = Clock(), LAYERS[:3]
    album, drawn = Album(clock), []
    for step in range(9):
        clock.now += 1e3
        drawn.append(flush(album, step, few))
    assert [bool(found) for found in drawn] == [True, True, False, True, False, False, False, True, False]
    assert drawn[0] == drawn[7] == tags(few)
    assert flush(album, 9, few, is_last=True) == tags(few)


def test_many_layers_are_drawn_by_and_by() -> None:
    """Those that were left come after the next flushes in their order, each once; at the end come all."""
    clock = Clock()
    album, drawn = Album(clock), []
    for step in range(8):
        clock.now += (AT_ONCE - 0.5) / SHARE - AT_ONCE
        drawn.append(flush(album, step, LAYERS))
    assert max(map(len, drawn)) == AT_ONCE
    waited = drawn[0] + drawn[1] + drawn[2]
    assert waited[: len(LAYERS)] == tags(LAYERS)
    assert waited[len(LAYERS) :] == tags(LAYERS)[: 3 * AT_ONCE - len(LAYERS)]  # due again since flush 2
    assert {tag for found in drawn[3:] for tag in found} == set(tags(LAYERS))
    assert sorted(flush(album, 8, LAYERS, is_last=True)) == sorted(tags(LAYERS))
