"""The flight recorder: what is written when a training ends badly, and what is read out of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import instrument
from instrument.capture.names import Site
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.flight import FLIGHT_FILE, Accident, FlightRecorder, grew_first, read_flight
from instrument.diagnose.readings import Reading
from instrument.record.tags import Tag

from ..training import mlp, train


def told(diagnostic: str, step: int) -> Finding:
    return Finding(Level.CRIT, diagnostic, None, step, 1.0, 0.0, "values", "it happened")


def test_the_first_nan_is_not_forgotten_for_a_spike(tmp_path: Path) -> None:
    """A spike after a non-finite value leaves the file alone, a non-finite value after a spike replaces it."""
    recorder = FlightRecorder(tmp_path, following=0)
    for diagnostic, step, kept in (("loss_spike", 1, 1), ("non_finite", 2, 2), ("gradient_spike", 3, 2)):
        recorder.see([Reading(step, {})], [told(diagnostic, step)])
        flight = read_flight(tmp_path)
        assert flight is not None
        assert flight[0].step == kept
        assert [reading.step for reading in flight[1]] == [kept]
    assert [path.name for path in tmp_path.iterdir()] == [FLIGHT_FILE]


def test_findings_of_other_kinds_are_no_accident(tmp_path: Path) -> None:
    """A dead layer is no reason to write the file."""
    recorder = FlightRecorder(tmp_path, following=5)
    recorder.see([Reading(1, {})], [told("dead_units", 1)])
    recorder.close()
    assert read_flight(tmp_path) is None


def test_numbers_that_json_does_not_know_are_left_out(tmp_path: Path) -> None:
    """A reading with Inf is written as valid JSON; what was finite is read back as it was."""
    values = {Tag("activations", "abs_max", "a"): 0.1, Tag("activations", "std", "a"): float("inf")}
    FlightRecorder(tmp_path, 0).happened(Accident("exception", 1, "x"), [Reading(1, values, loss=float("nan"))])
    flight = read_flight(tmp_path)
    assert flight is not None
    assert flight[1][0].values == {Tag("activations", "abs_max", "a"): 0.1}
    assert flight[1][0].loss is None


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"reason": "x", "step": 1, "sentence": "s"}\n[]\n'])
def test_a_damaged_file_is_told(text: str, tmp_path: Path) -> None:
    """A file that is none of ours is told in one line."""
    (tmp_path / FLIGHT_FILE).write_text(text)
    with pytest.raises(instrument.RunError, match="is damaged") as caught:
        read_flight(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_grew_first_stands_in_front() -> None:
    """Of two that grew the earlier is first; what grew and came back, or by less than tenfold, is not there."""
    sizes = {
        "late": [1.0] * 8 + [1.0, 50.0],
        "early": [1.0] * 8 + [11.0, 12.0],
        "back": [1.0] * 8 + [50.0, 1.0],
        "little": [1.0] * 8 + [9.0, 9.9],
        "zero": [0.0] * 8 + [0.0, 5.0],
    }
    readings = [
        Reading(step, {Tag("activations", "abs_max", name): values[step] for name, values in sizes.items()})
        for step in range(10)
    ]
    found = grew_first(readings, until=9, last=3)
    assert [(growth.site, growth.step, growth.factor) for growth in found] == [
        (Site("activations", "early"), 8, 12.0),
        (Site("activations", "late"), 9, 50.0),
    ]
    assert found[0].values == ((7, 1.0), (8, 11.0), (9, 12.0))
    assert grew_first(readings, until=7) == []


def test_an_exception_that_leaves_the_block_is_an_accident(tmp_path: Path) -> None:
    """Leaving a `with` by an exception writes the readings before it; Ctrl-C and an ordinary end write nothing."""
    for error, name in ((KeyError("x"), "error"), (KeyboardInterrupt(), "ctrl-c"), (None, "end")):
        model = mlp()
        try:
            with instrument.watch(model, interval=1, logdir=tmp_path / name, strict=True):
                train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
                if error is not None:
                    raise error
        except (KeyError, KeyboardInterrupt):
            pass
        flight = read_flight(tmp_path / name)
        assert (flight is not None) == (name == "error")
        if flight is not None:
            assert flight[0] == Accident("exception", 4, "the training ended with KeyError: 'x'")
            assert [reading.step for reading in flight[1]] == [0, 1, 2, 3, 4]


SCRIPT = """
import sys, torch, instrument
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
instrument.watch(model, logdir=sys.argv[1], interval=1)
for step in range(4):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("raise ValueError('no more')", "ValueError: no more"),
        ("raise KeyboardInterrupt", None),
        ("sys.exit(3)", None),
        ("", None),
    ],
)
def test_a_script_that_dies_of_an_exception_leaves_the_file(end: str, reason: str | None, tmp_path: Path) -> None:
    """Without `with` and without `close`, an exception that ends the script is an accident; other ends are not."""
    code = SCRIPT + textwrap.dedent(end)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=120, check=False)
    flight = read_flight(tmp_path)
    assert (flight is not None) == (reason is not None)
    if flight is not None:
        assert flight[0] == Accident("exception", 3, f"the training ended with {reason}")
        assert [reading.step for reading in flight[1]] == [0, 1, 2, 3]
