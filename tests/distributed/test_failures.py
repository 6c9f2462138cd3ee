"""Ranks that do not act together: told in words and in time, and never a hang."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

import instrument
from instrument.errors import RanksError
from tests.distributed.pair import Pair
from tests.distributed.test_data_parallel import network, train
from tests.without import PROJECT


def watch_on_first_only(rank: int, logdir: str) -> tuple[str, float, list[str]]:
    model = network()
    start = time.monotonic()
    message = ""
    if rank == 0:
        with pytest.raises(RanksError) as caught:
            instrument.watch(model, ranks="merge", logdir=logdir)
        message = str(caught.value)
    else:
        from instrument.record.ranks import group

        next(group._meetings)  # what the other rank has counted
    return message, time.monotonic() - start, [path.name for path in Path(logdir).parent.iterdir()]


def test_a_rank_that_does_not_watch_is_named_within_half_a_minute(pair: Pair, tmp_path: Path) -> None:
    """Where rank 1 never calls watch, rank 0 gets an error that names it within 30 seconds, and leaves no file."""
    (message, seconds, files), _ = pair.run(watch_on_first_only, str(tmp_path / "run"))
    assert message == (
        'rank 1 did not call watch(..., ranks="merge") within 25 s; every rank must, with the same arguments; '
        'ranks="first" lets rank 0 watch alone'
    )
    assert seconds < 30
    assert files == []


def watch_with_other_terms(rank: int, logdir: str) -> str:
    with pytest.raises(instrument.ConfigError) as caught:
        instrument.watch(network(), ranks="merge", interval=10 + rank, logdir=logdir)
    return str(caught.value)


def test_ranks_with_different_arguments_are_refused(pair: Pair, tmp_path: Path) -> None:
    """Different intervals would part the ranks for ever: both get an error that shows both."""
    for message in pair.run(watch_with_other_terms, str(tmp_path)):
        assert "interval=10" in message
        assert "interval=11" in message


def train_unevenly(rank: int, logdir: str) -> tuple[int, tuple[str, ...]]:
    model = network()
    with pytest.warns(instrument.InstrumentWarning, match="no longer merged"):
        watcher = instrument.watch(model, ranks="merge", interval=1, logdir=logdir)
        train(model, rank, steps=3)
        watcher.flush()
        if rank == 1:
            watcher.step(5)
        train(model, rank, steps=1)
        if rank == 1:
            watcher.step(7)
        watcher.flush()
    found = len(watcher.history), watcher.notices
    watcher.close()
    return found


def test_ranks_at_different_steps_go_on_alone(pair: Pair, tmp_path: Path) -> None:
    """Where the ranks' steps part, that is said once, and records are each rank's own from there."""
    (count, notices), _ = pair.run(train_unevenly, str(tmp_path))
    assert count == 4
    assert notices == (
        "sketches are no longer merged over the ranks: the ranks have recorded different steps, 3 and 7; what "
        "follows is of this rank alone",
    )


DYING = """
import os
import sys
import time
import torch.distributed as dist
import instrument
from instrument.record.ranks import group, sink
from tests.distributed.test_data_parallel import network, train

group.PATIENCE_SECONDS = sink.PATIENCE_SECONDS = 3.0
rank, directory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
model = network()
watcher = instrument.watch(model, ranks="merge", interval=1, logdir=f"{directory}/run")
train(model, rank, steps=2)
watcher.flush()
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(0.5)
start = time.monotonic()
train(model, rank, steps=3)
training = time.monotonic() - start
watcher.flush()
print(training, time.monotonic() - start, len(watcher.history), watcher.notices[-1])
"""


def test_a_rank_that_dies_hangs_nobody(tmp_path: Path) -> None:
    """After rank 1 is killed rank 0 trains on, says so, keeps its own records and ends."""
    command = [sys.executable, "-W", "ignore", "-c", DYING]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
        for rank in (0, 1)
    ]
    output, _ = ranks[0].communicate(timeout=100)
    ranks[1].communicate(timeout=100)
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 0
    training, flushing, count, notice = output.strip().split(" ", 3)
    assert int(count) == 5
    assert notice.startswith("sketches are no longer merged over the ranks: a rank did not take part: ")
    assert float(training) < 2
    assert float(flushing) < 30


def test_merging_needs_a_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by torchrun but before init_process_group, "merge" is refused and says what to call."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(instrument.ConfigError, match=r"init_process_group\(\) before watch\(\)"):
        instrument.watch(network(), ranks="merge", logdir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def watch_without_a_store(rank: int, logdir: str) -> str:
    from instrument import torch_private

    with pytest.MonkeyPatch.context() as patch, pytest.raises(instrument.ConfigError) as caught:
        patch.setattr(torch_private, "_lookup", lambda path: None)
        instrument.watch(network(), ranks="merge", logdir=logdir)
    return str(caught.value)


def test_without_a_store_to_meet_at_merging_is_refused(pair: Pair, tmp_path: Path) -> None:
    """In a torch that hides the store of its process group, "merge" says what it needs on every rank at once."""
    for message in pair.run(watch_without_a_store, str(tmp_path / "run")):
        assert message.startswith('ranks="merge" needs torch.distributed.init_process_group()')
    assert list(tmp_path.iterdir()) == []


def test_the_environment_of_torchrun_tells_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before init_process_group, the rank that torchrun gave counts: rank 1 makes no file."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    watcher = instrument.watch(network(), logdir=tmp_path / "run")
    assert "this is rank 1" in repr(watcher)
    assert list(tmp_path.iterdir()) == []


def test_one_process_merges_with_nobody(tmp_path: Path) -> None:
    """A script written for many ranks runs on one without a process group."""
    model = network()
    with instrument.watch(model, ranks="merge", interval=1, logdir=tmp_path, strict=True) as watcher:
        train(model, 0, steps=2)
        assert len(watcher.history) == 2


def join_late(rank: int, logdir: str) -> tuple[str, ...]:
    import torch.distributed as dist

    dist.destroy_process_group()
    model = network()
    watcher = instrument.watch(model, interval=1, logdir=f"{logdir}/{rank}")
    dist.init_process_group("gloo", init_method=f"file://{logdir}/meeting", rank=rank, world_size=2)
    with pytest.warns(instrument.InstrumentWarning, match="called before init_process_group"):
        train(DistributedDataParallel(model), rank, steps=2)
        watcher.flush()
    watcher.close()
    return watcher.notices


def test_watching_before_the_process_group_is_said(pair: Pair, tmp_path: Path) -> None:
    """Started without torchrun, a rank cannot be known before init_process_group; that is said once."""
    for notices in pair.run(join_late, str(tmp_path)):
        assert notices == (
            "watch() was called before init_process_group(), so every rank measures and writes a run of its own; call "
            "it afterwards",
        )


def look_on_first_only(rank: int, logdir: str) -> tuple[int, tuple[str, ...]]:
    model = network()
    watcher = instrument.watch(model, ranks="merge", interval=1, logdir=logdir, strict=True)
    wrapped = DistributedDataParallel(model)
    for _ in range(3):
        train(wrapped, rank, steps=1)
        if rank == 0:
            assert watcher.report() is not None
            assert len(watcher.history) <= watcher.current_step
    watcher.flush()
    found = len(watcher.history), watcher.notices
    watcher.close()
    return found


def test_a_look_that_one_rank_takes_alone_does_no_harm(pair: Pair, tmp_path: Path) -> None:
    """Rank 0 may print a report in its loop although the others are waiting for it: merging goes on."""
    assert pair.run(look_on_first_only, str(tmp_path)) == [(3, ()), (3, ())]
