"""Two real processes that train together over gloo, started once and given one function after another."""

from __future__ import annotations

import faulthandler
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
PATIENCE_SECONDS = 120.0


class Pair:
    """Runs a function on two ranks, each in a process group of its own making.

    A function that fails on a rank fails the test, with its traceback.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(rank, *args)` returns on each rank."""
        meeting = tempfile.mktemp(prefix="ranks-")
        for pipe in self._pipes:
            pipe.send((function, meeting, args))
        answers, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE_SECONDS), f"rank {rank} does not answer"
            assert self._processes[rank].is_alive(), f"rank {rank} ended with {self._processes[rank].exitcode}"
            failure, answer = pipe.recv()
            answers.append(answer)
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        Path(meeting).unlink(missing_ok=True)
        assert not failures, "\n".join(failures)
        return answers

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(30)
            if process.is_alive():
                process.kill()


def _serve(rank: int, pipe: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        function, meeting, args = task
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
        dist.barrier()  # a rank that is done at once would close what the other is still connecting to
        try:
            pipe.send((None, function(rank, *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        finally:
            dist.destroy_process_group()
