"""The commands, as a person types them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import instrument

from .training import mlp, train


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "instrument", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of five steps under `runs`."""
    model = mlp()
    with instrument.watch(model, interval=2, scalar_interval=1, strict=True) as watcher:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
        assert watcher.logdir is not None
        return (tmp_path / watcher.logdir).parents[1]


def test_report_prints_the_health_of_each_layer(run: Path) -> None:
    """`instrument report RUN` prints a row a layer and says that nothing was found, from either directory."""
    for path in (run, run / "logs" / "tensorboard"):
        result = command("report", str(path), cwd=run)
        assert result.returncode == 0, result.stderr
        rows = [line.split() for line in result.stdout.splitlines() if line.rstrip().endswith("OK")]
        assert [row[0] for row in rows] == ["0", "1", "2", "3"]
        assert "none: nothing looks wrong" in result.stdout
        assert "0.weight" not in result.stdout


def test_a_full_report_prints_the_last_values(run: Path) -> None:
    """`instrument report RUN --full` prints a table a kind too, from the run directory and from the one inside it."""
    for path in (run, run / "logs" / "tensorboard"):
        result = command("report", str(path), "--full", cwd=run)
        assert result.returncode == 0, result.stderr
        assert "0.weight" in result.stdout
        assert [section for section in ("Activations", "Parameters", "Gradients") if section in result.stdout] == [
            "Activations", "Parameters", "Gradients",
        ]  # fmt: skip


def test_report_as_json_is_for_programs(run: Path) -> None:
    """`--json` prints valid JSON with every statistic of every site."""
    rows = json.loads(command("report", str(run), "--json", cwd=run).stdout)["rows"]
    (row,) = [row for row in rows if (row["kind"], row["name"]) == ("gradients", "0.weight")]
    assert row["step"] == 4
    assert {"rms", "mean", "std", "abs_max", "zero_fraction"} <= set(row)


def test_check_tells_whole_files_from_torn_ones(run: Path) -> None:
    """`instrument check RUN` ends with 0 for whole files, and with 1 and the place for a torn one."""
    result = command("check", str(run), cwd=run)
    assert (result.returncode, result.stderr) == (0, "")
    assert "last step 4, whole" in result.stdout
    (path,) = (run / "logs" / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    result = command("check", str(run), cwd=run)
    assert result.returncode == 1
    assert "DAMAGED at byte" in result.stdout
    (found,) = json.loads(command("check", str(run), "--json", cwd=run).stdout)
    assert found["damage"]["offset"] > 0


def test_compare_tells_where_two_runs_part(run: Path, tmp_path: Path) -> None:
    """`instrument compare A B` says in a sentence and a table where a run parts from one that learns faster."""
    model = mlp()
    faster = tmp_path / "faster"
    with instrument.watch(model, interval=2, scalar_interval=1, logdir=faster, strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=5.0), 5)
    result = command("compare", str(run), str(faster), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    first, second, sentence, *table = [line for line in result.stdout.splitlines() if line.strip()]
    assert (first, second) == (f"A: {run}", f"B: {faster}")
    assert sentence.startswith("The runs part at step ")
    assert {line.split()[0] for line in table} >= {"0", "3"}
    found = json.loads(command("compare", str(run), str(faster), "--json", cwd=tmp_path).stdout)
    assert (found["first"], found["second"], found["alike"], found["steps"]) == (str(run), str(faster), True, [0, 4])
    assert found["sentence"] == sentence
    assert {"0.weight", "3.weight"} <= {parting["name"] for parting in found["partings"]}
    assert "do not part" in command("compare", str(run), str(run), cwd=tmp_path).stdout


def test_compare_on_nothing_in_common_is_one_line(run: Path, tmp_path: Path) -> None:
    """Runs that share no name or no step, and paths that are none, are told in one line with exit code 1."""
    table = torch.nn.Embedding(3, 3)
    with instrument.watch(table, interval=2, logdir=tmp_path / "other", strict=True):
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        table(torch.tensor([0, 1])).sum().backward()
        optimizer.step()
    result = command("compare", "other", str(run), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "instrument: the runs have no statistic in common: the first has activations of Embedding and 2 more"
    )
    assert result.stderr.count("\n") == 1
    result = command("compare", str(run), "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "instrument: there is no run nowhere\n")
    model = mlp()
    with instrument.watch(model, interval=2, logdir=tmp_path / "later", initial_step=100, strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    result = command("compare", str(run), "later", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "instrument: the runs have no step in common: the first has steps 0 to 4, the second 100 to 102\n"
    )


@pytest.mark.parametrize("name", ["report", "check"])
def test_wrong_paths_are_one_line_and_exit_code_1(name: str, tmp_path: Path) -> None:
    """A wrong path and an empty directory are told in one line, with exit code 1."""
    (tmp_path / "empty").mkdir()
    for path, words in (("nowhere", "there is no run nowhere"), ("empty", "empty holds no event files")):
        result = command(name, path, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"instrument: {words}\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def busy(port: int) -> Iterator[None]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        yield


def descendants(process: int) -> set[int]:
    """Process ids below a process, from the table of the kernel."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {process}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {process}
        found |= more


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_serves_clean_names_and_leaves_no_process(how: signal.Signals, run: Path) -> None:
    """`instrument tensorboard` prints its address once it answers, on the next free port, and leaves no trace."""
    port = free_port()
    with busy(port):
        process = subprocess.Popen(
            [sys.executable, "-m", "instrument", "tensorboard", "--port", str(port)],
            cwd=run.parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
    assert line.startswith("TensorBoard: http://127.0.0.1:"), process.communicate()
    address = line.split()[1]
    assert int(address.rstrip("/").rsplit(":", 1)[1]) > port
    with urllib.request.urlopen(f"{address}data/runs", timeout=10) as answer:
        assert json.load(answer) == [run.name]
    children = descendants(process.pid)
    assert children
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == 0
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"instrument-tensorboard-*/{process.pid}*"))


def test_all_ports_busy_is_one_clear_line(run: Path) -> None:
    """Where no port is free, one line names those that were tried, and the exit code is 1."""
    port = free_port()
    (run.parents[1] / "c.json").write_text(json.dumps({"default_port": port, "max_port_attempts": 1}))
    with busy(port):
        result = command("tensorboard", "--config", "c.json", cwd=run.parents[1])
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"instrument: no port is free for TensorBoard: tried {port}; free one, or give another default_port\n"
    )


def test_tensorboard_on_nothing_is_told(tmp_path: Path) -> None:
    """A directory that does not exist is told; TensorBoard itself would start and stay empty."""
    result = command("tensorboard", "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "instrument: there is no directory nowhere to show\n")


def test_launch_from_python_stops_with_its_block(run: Path) -> None:
    """`launch_tensorboard()` returns when the server answers; new runs appear; leaving the block stops it."""
    with instrument.launch_tensorboard(run.parent, port=free_port()) as server:
        assert repr(server) == f"TensorBoardServer({server.url})"
        make = run.parent / "later" / "logs" / "tensorboard"
        make.mkdir(parents=True)
        (file,) = (run / "logs" / "tensorboard").iterdir()
        (make / file.name).write_bytes(file.read_bytes())
        deadline = time.monotonic() + 60
        names: list[str] = []
        while "later" not in names and time.monotonic() < deadline:
            time.sleep(0.5)
            with urllib.request.urlopen(f"{server.url}data/runs", timeout=10) as answer:
                names = json.load(answer)
        assert sorted(names) == sorted([run.name, "later"])
    assert not server.is_running
    assert repr(server) == "TensorBoardServer(stopped)"


def test_the_commands_help_themselves(tmp_path: Path) -> None:
    """`--help` names every command; an unknown one is told with exit code 2."""
    result = command("--help", cwd=tmp_path)
    assert all(name in result.stdout for name in ("tensorboard", "report", "compare", "check"))
    assert command("reprot", "x", cwd=tmp_path).returncode == 2
