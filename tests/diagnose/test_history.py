"""The units of a run through time: since when, what is drawn, and that memory is bounded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instrument.diagnose.figures import MAX_COLUMNS, unit_map
from instrument.diagnose.history import CELLS_PER_MODULE, LEAST_COLUMNS, UnitHistory
from instrument.errors import RunError
from instrument.record.documents import UNITS_TAG, document, packed
from instrument.record.reading import read_steps

from .statuses import Statuses, status, write_units, write_values


def collected(flushes: dict[int, Statuses]) -> UnitHistory:
    history = UnitHistory()
    for step, statuses in flushes.items():
        history.add(step, statuses)
    return history


FLUSHES: dict[int, Statuses] = {
    100: {"a": status("a", [0.5, 0.5, 0.5], 100), "b": status("b", [0.2, 0.4], 100)},
    200: {"a": status("a", [0.0, 0.5, 0.5], 200), "b": status("b", [0.2, 0.4], 200)},
    300: {"a": status("a", [0.0, 0.0, 0.5], 300), "b": status("b", [0.0, 0.4], 300)},
    400: {"a": status("a", [0.0, 0.0, 0.5], 400), "b": status("b", [0.1, 0.4], 400)},
}


def test_since_is_the_beginning_of_the_first_silent_window() -> None:
    """A unit is silent since the first step of the first window in a row in which it was dead; a birth ends that."""
    history = collected(FLUSHES)
    assert history.since("a") == {0: 160, 1: 260}
    assert history.since("b") == {}
    assert history.latest["a"] == FLUSHES[400]["a"]
    assert list(history.latest) == ["a", "b"]


def test_a_run_on_disk_gives_the_same_history(tmp_path: Path) -> None:
    """What is read back from event files has the statuses, the times and the pictures of the live one."""
    live, read = collected(FLUSHES), UnitHistory.of_run(write_units(tmp_path, FLUSHES))
    assert read.latest == live.latest
    assert [read.since(name) for name in "ab"] == [live.since(name) for name in "ab"]
    assert [*map(read.value, read.drawn)] == [*map(live.value, live.drawn)]
    assert len(live.drawn) == 2


def test_pictures_are_unit_maps_of_what_was_given() -> None:
    """The picture of a module is the unit map of its rates at its steps, with the words of its function."""
    history = collected(FLUSHES)
    rates = np.array([FLUSHES[step]["a"].rate for step in FLUSHES]).T
    expected = unit_map("a", list(FLUSHES), np.maximum(np.round(rates * 253) / 253, 0))
    assert history.picture("a") == expected
    (first, second) = map(history.value, history.drawn)
    assert (first.tag, second.tag) == ("Activations.unit_map/a", "Activations.unit_map/b")
    assert Image.open(io.BytesIO(first.image.encoded_image_string)).tobytes() == expected.tobytes()
    tanh = collected({100: {"t": status("t", [0.0, 1.0], 100, function="tanh")}}).picture("t")
    assert tanh == unit_map("t", [100], [[0.0], [1.0]], ("always saturated", "never saturated"))
    assert tanh != unit_map("t", [100], [[0.0], [1.0]])


def test_modules_without_rates_have_no_picture() -> None:
    """A module of which only the range is known, or that saw no sample, is listed and not drawn."""
    history = collected({100: {"a": status("a", [], 100, units=4, verdict="no-data", samples=0)}})
    assert list(history.latest) == ["a"]
    assert history.picture("a") is None
    assert history.drawn == ()


def test_a_resumed_run_starts_again_where_it_resumed() -> None:
    """Flushes from a step on are void when that step comes again, as on resuming from a checkpoint."""
    again: dict[int, Statuses] = {200: {"a": status("a", [0.5, 0.5, 0.0], 200)}}
    history = collected(FLUSHES)
    history.add(200, again[200])
    fresh = collected({100: FLUSHES[100], **again})
    assert history.picture("a") == fresh.picture("a")
    assert history.since("a") == fresh.since("a") == {2: 160}


@pytest.mark.parametrize(("units", "flushes"), [(3, 3000), (200_000, 40)])
def test_long_runs_and_wide_layers_stay_small(units: int, flushes: int) -> None:
    """Whatever comes, a module has at most 512 columns and about a megabyte, and the last flush is in the last one."""
    history = UnitHistory()
    random = np.random.default_rng(0)
    for flush in range(flushes):
        history.add(flush, {"a": status("a", random.random(units).tolist(), flush, dead=(), saturated=())})
    columns = history._columns["a"]
    assert len(columns.steps()) <= MAX_COLUMNS
    assert len(columns.steps()) * units <= max(CELLS_PER_MODULE, LEAST_COLUMNS * units)
    assert columns.steps()[0] == 0
    assert columns.steps()[-1] == flushes - 1
    spread = np.diff([steps[0] for steps in columns._steps])
    assert len(set(spread.tolist())) == 1, "each column stands for as many flushes"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1200), st.integers(0, 1000))
def test_columns_that_stand_for_several_flushes_hold_their_mean(flushes: int, seed: int) -> None:
    """Rates are the means of the flushes of a column, and exactly zero only where every one of them was."""
    rates = np.random.default_rng(seed).choice([0.0, 0.0, 0.0, 0.25, 1.0], (flushes, 2))
    history = UnitHistory()
    for flush in range(flushes):
        history.add(flush, {"a": status("a", rates[flush].tolist(), flush)})
    columns = history._columns["a"]
    shown = columns.rates().T
    for column, steps in zip(shown, columns._steps, strict=True):
        exact = rates[steps].mean(axis=0)
        assert np.abs(column - exact).max() < 0.02
        assert ((column == 0) == (exact == 0)).all()
    assert [step for steps in columns._steps for step in steps] == list(range(flushes))


def test_runs_of_another_version_are_told(tmp_path: Path) -> None:
    """A document that does not hold statuses is one clear line, with the step."""
    write_values(tmp_path, {7: [document(UNITS_TAG, packed({"a": {"novel": 1}}))]})
    assert [contents.step for contents in read_steps(tmp_path)] == [7]
    with pytest.raises(RunError, match=r"the units of step 7 in .* were written by another version"):
        UnitHistory.of_run(tmp_path)
