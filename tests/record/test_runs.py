"""Run directories: names, numbers, and finding them again."""

from __future__ import annotations

import datetime
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from instrument import RunError
from instrument.record.runs import event_files, find_runs, make_run_directory, resolve_run

DAY = datetime.date(2026, 2, 10)


def test_numbers_count_up_from_the_highest_of_the_day(tmp_path: Path) -> None:
    """The next run of a day is one above the highest, gaps and other days notwithstanding."""
    runs = tmp_path / "runs"
    assert make_run_directory(runs, DAY) == runs / "2026-02-10_001" / "logs" / "tensorboard"
    (runs / "2026-02-10_007").mkdir()
    (runs / "2026-02-11_030").mkdir()
    (runs / "2026-02-10_best").mkdir()
    assert make_run_directory(runs, DAY).parts[-3] == "2026-02-10_008"
    (runs / "2026-02-10_999").mkdir()
    assert make_run_directory(runs, DAY).parts[-3] == "2026-02-10_1000"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_001", make_run_directory(tmp_path / "today").parts[-3])


def test_no_two_makers_get_the_same(tmp_path: Path) -> None:
    """Thirty runs begun at once have thirty directories, numbered without a gap."""
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(lambda _: make_run_directory(tmp_path, DAY), range(30)))
    assert sorted(path.parts[-3] for path in made) == [f"2026-02-10_{number:03d}" for number in range(1, 31)]


def _make_run(root: Path, name: str) -> Path:
    logs = root / name / "logs" / "tensorboard"
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1.host").write_bytes(b"")
    return logs


def test_a_run_is_found_by_either_directory(tmp_path: Path) -> None:
    """The run directory and the `logs/tensorboard` inside it both mean the run, as does any directory of events."""
    logs = _make_run(tmp_path, "a")
    assert resolve_run(tmp_path / "a") == logs
    assert resolve_run(str(logs)) == logs
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "events.out.tfevents.1.host").write_bytes(b"")
    assert resolve_run(plain) == plain
    assert [path.name for path in event_files(plain)] == ["events.out.tfevents.1.host"]


def test_runs_have_clean_names(tmp_path: Path) -> None:
    """Runs are named by what people call them, without `logs/tensorboard`."""
    _make_run(tmp_path, "2026-02-10_001")
    _make_run(tmp_path / "sweep", "lr=0.1")
    names = dict(find_runs(tmp_path))
    assert sorted(names) == ["2026-02-10_001", "sweep/lr=0.1"]
    assert [name for name, _ in find_runs(tmp_path / "2026-02-10_001")] == ["2026-02-10_001"]
    assert [name for name, _ in find_runs(names["2026-02-10_001"])] == ["tensorboard"]


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    """A missing path, a file, an empty directory and a directory of runs are each told for what they are."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    _make_run(tmp_path / "runs", "2026-02-10_001")
    _make_run(tmp_path / "runs", "2026-02-10_002")
    for name, words in [
        ("nowhere", "there is no run .*nowhere"),
        ("file", "is a file; give the run directory it lies in"),
        ("empty", "holds no event files"),
        ("runs", r"is no run but holds 2; the newest is .*2026-02-10_002"),
    ]:
        with pytest.raises(RunError, match=words) as error:
            resolve_run(tmp_path / name)
        assert "\n" not in str(error.value)
