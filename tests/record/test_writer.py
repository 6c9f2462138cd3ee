"""The writer in the real world: exits, signals, forks, full disks, vanished directories, several processes.

Each case runs in a process of its own, and what is on disk afterwards is read by TensorBoard's own reader.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

import instrument
from instrument.record.event_file import CHUNK_BYTES, EventFile
from instrument.record.events import Damage, check_file, framed, scan
from instrument.record.runs import event_files

from ..training import mlp, read_back, train

PREAMBLE = """
import os, signal, sys, threading, time, torch, instrument
from torch import nn
torch.manual_seed(0)
logdir = sys.argv[1]
def watch(**arguments):
    global model, optimizer, watcher
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, logdir=logdir, **{"interval": 1, **arguments})
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
"""


def start(script: str, logdir: Path, *options: str) -> subprocess.Popen[str]:
    code = PREAMBLE + textwrap.dedent(script)
    command = [sys.executable, *options, "-c", code, str(logdir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, logdir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    process = start(script, logdir, *options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_whole(logdir: Path) -> None:
    """No file has a torn record or a wrong checksum, except for a cut at its very end."""
    for path in event_files(logdir):
        assert check_file(path).damage is None


EXITS = [
    ("ordinary end", "watch(); train(20)", 0),
    ("sys.exit", "watch(); train(20); sys.exit(3)", 3),
    ("exception", "watch(); train(20); raise KeyError('x')", 1),
    ("KeyboardInterrupt", "watch(); train(20); raise KeyboardInterrupt", 130),
    ("local variable", "def main():\n    watch(); train(20)\n    globals().clear()\nmain()", 0),
    ("warnings as errors", "watch(); train(20)", 0),
]


@pytest.mark.parametrize(("name", "script", "code"), EXITS, ids=[name for name, _, _ in EXITS])
def test_nothing_is_lost_at_exit_without_close(name: str, script: str, code: int, tmp_path: Path) -> None:
    """However Python ends by itself, every step is on disk, though nobody called `close`."""
    options = ("-W", "error") if name == "warnings as errors" else ()
    result = run(script, tmp_path, *options)
    assert result.returncode in (code, -signal.SIGINT if code == 130 else code), result.stderr
    histograms, _ = read_back(tmp_path)
    assert histograms["Gradients/0.weight"] == list(range(20))
    assert histograms["Activations/1"] == list(range(20))
    assert_whole(tmp_path)


def test_the_last_step_is_logged_at_exit(tmp_path: Path) -> None:
    """At exit the last step is on disk with parameters and gradients, though it was not sampled."""
    assert run("watch(interval=10); train(18)", tmp_path).returncode == 0
    histograms, scalars = read_back(tmp_path)
    assert histograms["Parameters/0.weight"] == [0, 10, 17]
    assert histograms["Gradients/0.weight"] == [0, 10, 17]
    assert histograms["Activations/0"] == [0, 10]
    assert list(scalars["Gradients.rms/0.weight"]) == [0, 10, 17]


def test_sigterm_leaves_a_whole_file_with_what_was_written(tmp_path: Path) -> None:
    """SIGTERM, which ends Python without a word, leaves a whole file with all but the newest steps."""
    process = start("watch(); train(30); time.sleep(0.5); print('ready', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    histograms, _ = read_back(tmp_path)
    assert histograms["Gradients/0.weight"] == list(range(29))  # the last waits for the next step to begin
    assert_whole(tmp_path)


@pytest.mark.parametrize("moment", [0.0, 0.03, 0.1, 0.25])
def test_sigkill_at_any_moment_leaves_what_was_flushed(moment: float, tmp_path: Path) -> None:
    """Killed at any moment, the file can be read up to the last record and holds everything flushed."""
    script = """
        watch()
        for step in range(10**6):
            train(1)
            if step % 5 == 4:
                watcher.flush()
                print(step, flush=True)
    """
    process = start(script, tmp_path)
    assert process.stdout is not None
    flushed = [process.stdout.readline() for _ in range(3)]
    time.sleep(moment)
    process.kill()
    rest, _ = process.communicate(timeout=30)
    flushed += [line for line in rest.splitlines() if line.isdigit()]
    (path,) = event_files(tmp_path)
    records = [record for record in scan(path) if not isinstance(record, Damage)]
    damage = [record for record in scan(path) if isinstance(record, Damage)]
    assert all("cut" in found.reason for found in damage)
    steps = read_back(tmp_path)[0]["Gradients/0.weight"]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= int(flushed[-1])
    assert len(records) >= len(steps)


def test_a_forked_child_neither_writes_nor_blocks(tmp_path: Path) -> None:
    """A child that trains the watched model writes nothing of ours and ends; the parent goes on."""
    script = """
        watch()
        train(3)
        watcher.flush()
        child = os.fork()
        if child == 0:
            train(40)
            watcher.flush()
            watcher.close()
            os._exit(7)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
        train(3)
    """
    result = run(script, tmp_path, "-W", "ignore::DeprecationWarning")
    assert result.stdout == "7\n", result.stderr
    assert len(event_files(tmp_path)) == 1
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == [0, 1, 2, 3, 4, 5]
    assert_whole(tmp_path)


def test_a_forked_child_that_exits_by_itself_leaves_the_parents_file_alone(tmp_path: Path) -> None:
    """Exit handlers that a child inherits write and close nothing of the parent's."""
    script = """
        watch()
        train(3)
        watcher.flush()
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        train(2)
    """
    assert run(script, tmp_path, "-W", "ignore::DeprecationWarning").returncode == 0
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == [0, 1, 2, 3, 4]
    assert_whole(tmp_path)


def test_a_forked_child_may_log_to_our_writer(tmp_path: Path) -> None:
    """What a child adds to our writer itself goes to a file of its own, where torch's writer would hang."""
    script = """
        writer = instrument.SummaryWriter(logdir)
        for step in range(5):
            writer.add_scalar("parent", 1.0, step)
        if os.fork() == 0:
            for step in range(50):
                writer.add_scalar("child", 2.0, step)
            sys.exit(0)
        os.wait()
        writer.add_scalar("parent", 1.0, 5)
    """
    assert run(script, tmp_path, "-W", "ignore::DeprecationWarning").returncode == 0
    _, scalars = read_back(tmp_path)
    assert list(scalars["parent"]) == list(range(6))
    assert list(scalars["child"]) == list(range(50))
    assert len(event_files(tmp_path)) == 2
    assert_whole(tmp_path)


def test_spawned_workers_of_a_data_loader_do_no_harm(tmp_path: Path) -> None:
    """Forked workers of a data loader end while the watch goes on."""
    script = """
        watch()
        data = torch.utils.data.DataLoader(list(torch.randn(32, 4)), batch_size=8, num_workers=2)
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    """
    result = run(script, tmp_path, "-W", "ignore::DeprecationWarning")
    assert result.returncode == 0, result.stderr
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == [0, 1, 2, 3]
    assert len(event_files(tmp_path)) == 1


def test_a_full_disk_is_told_once_and_nothing_torn_remains(tmp_path: Path) -> None:
    """Where the disk is full, training goes on; when there is room again, everything is written after all."""
    script = """
        import resource
        watch()
        train(2)
        watcher.flush()
        size = os.path.getsize(os.path.join(logdir, os.listdir(logdir)[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, resource.RLIM_INFINITY))
        train(10)
        watcher.flush()
        print("full", os.path.getsize(os.path.join(logdir, os.listdir(logdir)[0])) <= size + 5000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        train(3)
    """
    result = run(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "full True\n"
    assert result.stderr.count("events cannot be written") == 1
    assert "training goes on" in result.stderr
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == list(range(15))
    assert_whole(tmp_path)


def test_a_disk_that_stays_full_is_told_at_the_end_with_what_was_lost(tmp_path: Path) -> None:
    """Where the disk stays full, the file ends with the last whole record, and what is lost is counted."""
    script = """
        import resource
        watch()
        train(2)
        watcher.flush()
        size = os.path.getsize(os.path.join(logdir, os.listdir(logdir)[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3000, size + 3000))
        train(10)
    """
    result = run(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "records could not be written" in result.stderr
    assert_whole(tmp_path)
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == [0, 1]


def test_a_vanished_directory_is_made_again(tmp_path: Path) -> None:
    """Where somebody removes the run directory, writing goes on in a new file, with one warning."""
    script = """
        import shutil
        watch()
        train(5)
        watcher.flush()
        shutil.rmtree(logdir)
        train(5)
    """
    result = run(script, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("has vanished; writing goes on") == 1
    assert read_back(tmp_path / "run")[0]["Gradients/0.weight"] == [5, 6, 7, 8, 9]
    assert_whole(tmp_path / "run")


def test_a_directory_that_cannot_be_made_leaves_training_unwatched(tmp_path: Path) -> None:
    """A run directory under a file cannot be made: one warning, and training goes on unwatched."""
    (tmp_path / "file").write_text("in the way")
    model = mlp()
    with pytest.warns(instrument.InstrumentWarning, match="training goes on unwatched") as caught:
        watcher = instrument.watch(model, logdir=tmp_path / "file" / "run")
        assert len(train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)) == 3
        watcher.writer.add_scalar("loss", 1.0, 0)
        watcher.close()
    assert len(caught) == 1
    assert repr(watcher) == "Watcher(off: there is no directory to write to)"
    with pytest.warns(instrument.InstrumentWarning, match="no run directory can be made under"):
        instrument.watch(model, config={"runs_directory": str(tmp_path / "file" / "runs")})


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    """Four processes that start together share neither a run directory nor a file, and all files are whole."""
    script = "os.chdir(logdir)\nlogdir = None\nwatch(); train(10); print(watcher.logdir)"
    processes = [start(script, tmp_path) for _ in range(4)]
    directories = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        directories.append(tmp_path / out.strip())
    assert len(set(directories)) == 4
    for directory in directories:
        assert read_back(directory)[0]["Gradients/0.weight"] == list(range(10))
        assert_whole(directory)


def test_a_slow_disk_does_not_hold_up_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk takes a second for each write, a step takes no such time; closing waits for the disk."""
    from instrument.record.event_file import EventFile

    written = EventFile.write

    def slow(self: EventFile, *parts: bytes) -> None:
        time.sleep(0.2)
        written(self, *parts)

    monkeypatch.setattr(EventFile, "write", slow)
    model = mlp()
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    start = time.monotonic()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 10)
    trained = time.monotonic() - start
    watcher.close()
    closed = time.monotonic() - start
    assert closed > 2.0 > trained
    assert read_back(tmp_path)[0]["Gradients/0.weight"] == list(range(10))


def test_writing_goes_on_after_close_as_with_torch(tmp_path: Path) -> None:
    """A point added after `close` goes to a second file of the same run, as torch's writer does."""
    writer = instrument.SummaryWriter(tmp_path)
    writer.add_scalar("a", 1.0, 0)
    writer.close()
    writer.close()
    writer.add_scalar("a", 2.0, 1)
    writer.flush()
    assert list(read_back(tmp_path)[1]["a"]) == [0, 1]
    writer.close()


def test_our_writer_does_all_that_torchs_does(tmp_path: Path) -> None:
    """Scalars, histograms, images, texts, graphs and custom scalars of torch's own writer work with ours."""
    with instrument.SummaryWriter(tmp_path, comment="x", purge_step=3, max_queue=1, flush_secs=1) as writer:
        writer.add_scalar("s", 1.0, 3)
        writer.add_scalars("many", {"a": 1.0, "b": 2.0}, 3)
        writer.add_histogram("h", torch.randn(100), 3)
        writer.add_image("i", torch.rand(3, 4, 4), 3)
        writer.add_text("t", "hello", 3)
        writer.add_graph(torch.nn.Linear(2, 1), torch.ones(1, 2))
        writer.add_custom_scalars({"c": {"d": ["Multiline", ["s"]]}})
        writer.add_hparams({"lr": 0.1}, {"metric": 1.0}, run_name="hparams")
        assert writer.get_logdir() == tmp_path
    histograms, scalars = read_back(tmp_path)
    assert histograms["h"] == [3]
    assert scalars["s"] == {3: 1.0}


def test_our_files_begin_with_a_start_record(tmp_path: Path) -> None:
    """The first file has a START record, so that the one of a resumed run purges what came after it."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    instrument.SummaryWriter(tmp_path, purge_step=5).close()
    (path,) = event_files(tmp_path)
    events = [Event.FromString(data) for data in scan(path) if isinstance(data, bytes)]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].session_log.status, events[1].step) == (SessionLog.START, 5)


def test_records_are_framed_as_tensorboard_frames_them(tmp_path: Path) -> None:
    """The bytes of a record equal those that TensorBoard's own record writer makes, byte for byte."""
    import io

    from tensorboard.summary.writer.record_writer import RecordWriter

    for data in (b"", b"x", os.urandom(1000)):
        file = io.BytesIO()
        RecordWriter(file).write(data)
        assert b"".join(map(bytes, framed(data))) == file.getvalue()


def test_torchs_histograms_and_ours_agree(tmp_path: Path) -> None:
    """The moments that TensorBoard stores of our histogram equal those of torch's own `add_histogram`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = mlp()
    with instrument.watch(model, interval=1, logdir=tmp_path / "ours", strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with TorchSummaryWriter(str(tmp_path / "torch")) as writer:
        writer.add_histogram("w", model[0].weight, 0)
    ours = EventAccumulator(str(tmp_path / "ours")).Reload().Histograms("Parameters/0.weight")[0].histogram_value
    theirs = EventAccumulator(str(tmp_path / "torch")).Reload().Histograms("w")[0].histogram_value
    assert (ours.min, ours.max, ours.num) == (theirs.min, theirs.max, theirs.num)
    assert ours.sum == pytest.approx(theirs.sum, rel=1e-6)
    assert ours.sum_squares == pytest.approx(theirs.sum_squares, rel=1e-6)
    assert sum(ours.bucket) == sum(theirs.bucket) == 32
    assert len(ours.bucket) == len(ours.bucket_limit) <= 66


@pytest.mark.parametrize("first", ["torch", "ours"])
def test_torchs_own_writer_in_the_same_directory_takes_no_file_from_ours(first: str, tmp_path: Path) -> None:
    """Made in one process, one second and one directory, both writers have a file of their own, whoever is first."""
    script = """
    class Clock:
        time = staticmethod(lambda now=int(time.time()): now)
        def __getattr__(self, name): return getattr(time, name)
    from tensorboard.summary.writer import event_file_writer
    from torch.utils.tensorboard import SummaryWriter
    from instrument.record import event_file
    event_file_writer.time = event_file.time = Clock()
    makers = {"ours": watch, "torch": lambda: SummaryWriter(logdir)}
    made = {name: makers[name]() for name in ORDER}
    made["torch"].add_scalar("loss", 0.5, 1)
    train(3)
    made["torch"].close()
    """
    order = sorted(["torch", "ours"], key=lambda name: name != first)
    process = run(textwrap.dedent(script).replace("ORDER", str(order)), tmp_path, "-W", "error")
    assert process.returncode == 0, process.stderr
    theirs, ours = (read_back(path) for path in sorted(tmp_path.iterdir()))
    assert ours[0]["Gradients/0.weight"] == [0, 1, 2]
    assert theirs[1] == {"loss": {1: 0.5}}


def test_nan_and_inf_reach_no_edge_and_no_bucket(tmp_path: Path) -> None:
    """A step with NaN and Inf has a histogram of its finite values, and counts as scalars from then on."""
    model = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with instrument.watch(model, kinds=["gradients"], interval=1, logdir=tmp_path, strict=True):
        for row in ([1.0, 2.0], [float("nan"), float("inf")], [float("nan"), float("nan")], [1.0, 1.0]):
            model.weight.grad = torch.tensor([row, [3.0, 0.0]] if row[1] == row[1] else [row, row])
            optimizer.step()
    histograms, scalars = read_back(tmp_path)
    assert histograms["Gradients/weight"] == [0, 1, 3]
    assert scalars["Gradients.nan_count/weight"] == {1: 1.0, 2: 4.0, 3: 0.0}
    assert scalars["Gradients.inf_count/weight"] == {1: 1.0, 2: 0.0, 3: 0.0}
    assert list(scalars["Gradients.rms/weight"]) == [0, 1, 3]


def test_ctrl_c_in_the_middle_of_a_record_leaves_nothing_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large record goes out in pieces; what an interrupt leaves of one is cut off, and the next attempt is whole."""
    file, calls, write = EventFile(tmp_path), itertools.count(), os.write

    def interrupted(descriptor: int, data: bytes) -> int:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return write(descriptor, data)

    monkeypatch.setattr("instrument.record.event_file.os.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.write(Event(step=1, file_version="x" * (3 * CHUNK_BYTES)).SerializeToString())
    file.write(Event(step=2).SerializeToString())
    file.close()
    check = check_file(file.path)
    assert (check.damage, check.records) == (None, 3)
