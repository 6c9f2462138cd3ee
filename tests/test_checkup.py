"""The checkup of a watch: what of it TensorBoard, a foreign writer, the commands and the console get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

import instrument
from instrument.diagnose.report import Report
from instrument.diagnose.units import UnitStatus, UnitWindows
from instrument.record.runs import event_files

from .diagnose.making import status
from .test_cli import command
from .training import mlp, read_back, train


def texts(logdir: Path, tag: str) -> dict[int, str]:
    """Texts of a tag by step, as TensorBoard's reader gives them."""
    accumulator = EventAccumulator(str(logdir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {event.step: event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag)}


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> dict[str, UnitStatus]:
    """Every watch is told that six of ten units of layer 1 are dead, in two windows."""
    units = {
        "1": status(
            "1",
            dead=(0, 1, 2, 3, 4, 5),
            verdict="dead",
            windows=2,
            deaths=(4, 5),
            saturated=(0.125,) * 10,
            function="tanh",
        )
    }
    monkeypatch.setattr(UnitWindows, "status", lambda self: units)
    return units


def test_units_go_everywhere(dead: dict[str, UnitStatus], tmp_path: Path) -> None:
    """A dead layer is a warning, a finding, scalars, a row, a log entry and a document that the report reads back."""
    model = mlp()
    with pytest.warns(instrument.InstrumentWarning, match="CRIT step 0, layer 1: 6 of 10 units"):
        watcher = instrument.watch(model, interval=4, scalar_interval=2, logdir=tmp_path, strict=True)
        train(model, sgd(model), 9)
        watcher.close()
    assert watcher.dead_units() == dead
    assert [(f.diagnostic, f.step) for f in watcher.findings()] == [("dead_units", 0)]
    _, scalars = read_back(tmp_path)
    assert scalars["Activations.dead_fraction/1"] == dict.fromkeys((0, 4, 8), pytest.approx(0.6))
    assert scalars["Activations.saturated_fraction/1"] == dict.fromkeys((0, 4, 8), 0.125)
    health = texts(tmp_path, "health/text_summary")
    assert list(health) == [0, 4, 8]
    assert "`1` | 10 | 60 % | 0.073 %" in health[8]
    log = texts(tmp_path, "health/events/text_summary")
    assert log[0].splitlines()[0].startswith("* **CRIT** step 0, layer 1: 6 of 10 units")
    assert "2 units fell silent and 0 came back" in log[0].splitlines()[1]
    (row,) = [row for row in Report.of_run(tmp_path).health if row.layer == "1"]
    assert (row.units, row.dead_fraction, row.saturated_fraction) == (10, 0.6, 0.125)
    assert row.flags == ("CRIT dead_units",)


def test_a_foreign_writer_gets_scalars_and_texts(dead: dict[str, UnitStatus], tmp_path: Path) -> None:
    """Through torch's own writer the same scalars and the same texts are written."""
    model, writer = mlp(), TorchSummaryWriter(str(tmp_path))
    with pytest.warns(instrument.InstrumentWarning, match="CRIT"):
        watcher = instrument.watch(model, interval=4, writer=writer, strict=True)
        train(model, sgd(model), 5)
        watcher.close()
    writer.close()
    _, scalars = read_back(tmp_path)
    assert list(scalars["Activations.dead_fraction/1"]) == [0, 4]
    assert list(scalars["Gradients.l2/_global"]) == [0, 4]
    assert "| 60 % |" in texts(tmp_path, "health/text_summary")[4]


def test_a_fault_in_the_checkup_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where units cannot be judged, that is told once, training goes on, and what was recorded is written."""

    def fail(self: UnitWindows) -> Any:
        raise RuntimeError("no units")

    monkeypatch.setattr(UnitWindows, "status", fail)
    model = mlp()
    with pytest.warns(instrument.InstrumentWarning, match="failed with RuntimeError: no units") as caught:
        watcher = instrument.watch(model, interval=1, logdir=tmp_path)
        losses = train(model, sgd(model), 5)
        watcher.close()
    assert len([one for one in caught if "no units" in str(one.message)]) == 1
    assert len(losses) == 5
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == [0, 1, 2, 3, 4]


def test_what_was_not_observed_stands_in_the_run(tmp_path: Path) -> None:
    """A notice of the live watch is printed by the report of its run."""
    model = mlp()
    with pytest.warns(instrument.InstrumentWarning, match="matches no name"):
        watcher = instrument.watch(model, exclude="dropout", interval=1, logdir=tmp_path)
    train(model, sgd(model), 2)
    watcher.close()
    assert Report.of_run(tmp_path).notices == watcher.notices
    assert "matches no name" in str(Report.of_run(tmp_path))


def test_a_report_without_a_step_says_so(tmp_path: Path) -> None:
    """Before the first step, and of a watch that is off, a report has nothing to show and does not fail."""
    with instrument.watch(mlp(), logdir=tmp_path) as watcher:
        assert str(watcher.report()) == "nothing has been recorded yet"
        assert watcher.findings() == ()
    off = instrument.watch(mlp(), interval=0)
    assert (off.findings(), off.dead_units(), str(off.report())) == ((), {}, "nothing has been recorded yet")


def test_the_command_prints_findings_for_people_and_programs(dead: dict[str, UnitStatus], tmp_path: Path) -> None:
    """`instrument report` prints what was found, what came before an accident, and all of it as JSON."""
    model = mlp()
    with (
        pytest.warns(instrument.InstrumentWarning, match="CRIT"),
        pytest.raises(KeyError),
        instrument.watch(model, interval=1, logdir=tmp_path),
    ):
        train(model, sgd(model), 6)
        raise KeyError("end")
    result = command("report", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "6 of 10 units (60 %) were silent" in " ".join(result.stdout.split())
    (row,) = [line.split() for line in result.stdout.splitlines() if line.split()[:2] == ["1", "10"]]
    assert row[2:4] == ["60", "%"]
    assert "Before the accident at step 5 (exception)" in result.stdout
    found = json.loads(command("report", str(tmp_path), "--json", cwd=tmp_path).stdout)
    assert set(found) == {"health", "findings", "accident", "growths", "notices", "rows"}
    assert found["accident"]["sentence"] == "the training ended with KeyError: 'end'"
    (finding,) = found["findings"]
    assert (finding["level"], finding["diagnostic"], finding["name"]) == ("CRIT", "dead_units", "1")


def test_a_torn_run_is_read_up_to_there_and_the_tear_is_told(tmp_path: Path) -> None:
    """Of a file that is cut, what comes before is shown, and the place of the cut among what was not observed."""
    model = mlp()
    with instrument.watch(model, interval=1, logdir=tmp_path):
        train(model, sgd(model), 6)
    (path,) = event_files(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = command("report", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    assert "Health" in result.stdout
    assert "is damaged at byte" in result.stdout
    assert "is damaged at byte" in result.stderr
    path.write_bytes(path.read_bytes()[:40])
    result = command("report", str(tmp_path), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
