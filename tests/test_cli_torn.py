"""The commands on files that are torn, altered or none of ours, and on an output that takes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import instrument
from instrument.diagnose.flight import FLIGHT_FILE
from instrument.record.events import framed, scan
from instrument.record.runs import event_files

from .test_cli import command
from .training import mlp, train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six steps."""
    model = mlp()
    with instrument.watch(model, interval=2, scalar_interval=1, logdir=tmp_path / "run", strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 6)
    return tmp_path / "run"


def offsets(path: Path) -> list[int]:
    """Where each record of a whole file begins."""
    found, offset = [], 0
    for data in scan(path):
        assert isinstance(data, bytes)
        found.append(offset)
        offset += len(data) + 16
    return found


def alter(path: Path, share: float) -> int:
    """Flip one bit in the data of the record at a share of the file; returns where that record begins."""
    begins = offsets(path)
    start = begins[int(share * len(begins))]
    data = bytearray(path.read_bytes())
    data[start + 14] ^= 1
    path.write_bytes(data)
    return start


@pytest.mark.parametrize("name", ["report", "dead", "compare"])
def test_what_is_whole_is_shown_and_the_damage_told(name: str, run: Path) -> None:
    """A flipped bit near the end leaves tables on the output, one line with its place on the error stream, code 1."""
    (path,) = event_files(run)
    start = alter(path, 0.9)
    for form in ([], ["--json"]):
        result = command(name, *([str(run)] * (2 if name == "compare" else 1)), *form, cwd=run)
        assert result.returncode == 1
        lines = result.stderr.splitlines()
        assert len(lines) == (2 if name == "compare" else 1)
        assert lines[0] == (
            f"instrument: {path.name} is damaged at byte {start}: the data of a record does not agree with its "
            "checksum; it is read up to there"
        )
        if form:
            assert json.loads(result.stdout)
        else:
            assert len(result.stdout.splitlines()) >= (3 if name == "compare" else 6)


def test_altered_numbers_are_never_shown(run: Path) -> None:
    """A bit flipped in one value of the last step changes nothing that is shown of the steps before."""
    whole = json.loads(command("report", str(run), "--json", cwd=run).stdout)["rows"]
    alter(event_files(run)[0], 0.999)
    read = json.loads(command("report", str(run), "--json", cwd=run).stdout)["rows"]
    for row in read:
        (same,) = [other for other in whole if (other["kind"], other["name"]) == (row["kind"], row["name"])]
        assert row["step"] < same["step"] or row == same


@pytest.mark.parametrize("name", ["report", "dead", "check"])
def test_a_file_of_junk_is_one_line_with_the_reason(name: str, tmp_path: Path) -> None:
    """A file that has the name of an event file and is none is told in one line, with why."""
    (tmp_path / "events.out.tfevents.1.junk").write_bytes(b"this is no event file at all")
    result = command(name, str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    (line,) = (result.stdout if name == "check" else result.stderr).splitlines()
    assert "byte 0: the length of a record does not agree with its checksum" in line


@pytest.mark.parametrize("name", ["report", "check"])
def test_a_sound_record_that_is_no_event_is_told(name: str, run: Path) -> None:
    """A record with right checksums around bytes that are no event ends the file, without a traceback."""
    (path,) = event_files(run)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"".join(map(bytes, framed(b"\xff\xff\xff\xff"))))
    result = command(name, str(run), cwd=run)
    assert result.returncode == 1
    assert f"at byte {size}: a record with a right checksum holds no event" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_flight_recorder_does_not_cost_the_report(run: Path) -> None:
    """Where the flight recorder's file is damaged, the health is shown, and one line says so with exit code 1."""
    (run / FLIGHT_FILE).write_text("no json\n")
    result = command("report", str(run), cwd=run)
    assert result.returncode == 1
    assert "Health" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"instrument: {run / FLIGHT_FILE} is damaged")


@pytest.mark.parametrize("name", ["report", "dead", "check"])
def test_a_full_disk_is_one_line(name: str, run: Path) -> None:
    """Output that a full disk does not take is told in one line with exit code 1."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "instrument", name, str(run)], stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=120,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "instrument: [Errno 28] No space left on device\n")


def test_a_reader_that_has_seen_enough_is_no_fault(run: Path) -> None:
    """A pipe that is closed before everything was read leaves nothing on the error stream."""
    process = subprocess.Popen(
        [sys.executable, "-m", "instrument", "report", str(run), "--json"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 1
