"""This process among the others of `torch.distributed`, and a process group of our own.

Requirements that shaped it:

* nothing of ours may come between the collectives of the training: those of ours run over a gloo group of their
  own, on the thread that writes, and the default group never sees them;
* making a group is itself something that hangs where one rank does not take part, so the ranks first meet by
  name in the key-value store that `init_process_group` has opened, by asking, never by waiting in it;
* a rank that dies must not hang the others: each wait ends after `PATIENCE_SECONDS` with an error.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from instrument.errors import ConfigError, RanksError
from instrument.measure.sketch import FloatArray
from instrument.torch_private import meeting_store

__all__ = ["PATIENCE_SECONDS", "Position", "RankGroup", "position"]

PATIENCE_SECONDS = 25.0
"""How long ranks wait for each other."""

_ASK_EVERY_SECONDS = 0.02


_OPERATIONS: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


class Position(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int
    world: int
    is_joined: bool
    """Whether `init_process_group` was called; else rank and world are what `torchrun` has put into the environment."""


def position() -> Position:
    """Where this process stands; rank 0 of 1 where nothing tells of others.

    Example:
        >>> position()
        Position(rank=0, world=1, is_joined=False)
    """
    if dist.is_available() and dist.is_initialized():
        return Position(dist.get_rank(), dist.get_world_size(), True)
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return Position(0, 1, False)
    return Position(rank, world, False) if 0 <= rank < world else Position(0, 1, False)


_meetings = itertools.count()
"""Numbers the groups that this process forms: ranks that make the same calls in the same order meet."""


class RankGroup:
    """All ranks, for reductions of our own.

    Args:
        place: Rank and number of ranks.
        group: A `torch.distributed.ProcessGroupGloo`, or anything with its `allreduce` and `allgather`.
    """

    def __init__(self, place: Position, group: Any) -> None:
        self.rank = place.rank
        self.world = place.world
        self.reductions = 0
        """Reductions made so far."""
        self._group = group

    @classmethod
    def form(cls, terms: str) -> RankGroup:
        """Meet all other ranks.

        Args:
            terms: What all ranks must agree on, such as intervals, as a text.

        Returns:
            The group.

        Raises:
            ConfigError: There is no process group, or another rank has other terms.
            RanksError: Some ranks did not come within `PATIENCE_SECONDS`, or cannot be reached.
        """
        place = position()
        store = meeting_store() if place.is_joined else None
        if store is None or not hasattr(dist, "ProcessGroupGloo"):
            raise ConfigError(
                'ranks="merge" needs torch.distributed.init_process_group() before watch(), and a torch built with '
                'gloo; ranks="first" and "each" need neither'
            )
        from torch.distributed.distributed_c10d import PrefixStore  # not there in builds without torch.distributed

        store = PrefixStore(f"instrument/{next(_meetings)}", store)
        _meet(store, place, terms)
        try:
            patience = datetime.timedelta(seconds=PATIENCE_SECONDS)
            group = dist.ProcessGroupGloo(store, place.rank, place.world, patience)
        except RuntimeError as error:
            raise RanksError(f"the ranks cannot reach each other over gloo: {error}") from error
        return cls(place, group)

    def all_reduce(self, values: FloatArray, operation: str) -> None:
        """Combine values over all ranks, in place.

        Args:
            values: Float64 of shape (n,), with the same n on every rank.
            operation: "sum" or "max".

        Raises:
            RanksError: A rank did not take part.
        """
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[operation]
        self.reductions += 1
        try:
            self._group.allreduce([torch.from_numpy(values)], options).wait()
        except RuntimeError as error:
            raise RanksError(f"a rank did not take part: {_first_line(error)}") from error

    def gather(self, text: str) -> list[str]:
        """A text of each rank, in the order of ranks.

        Raises:
            RanksError: A rank did not take part.
        """
        data = text.encode()
        longest = np.array([float(len(data))])
        self.all_reduce(longest, "max")
        own = torch.zeros(8 + int(longest[0]), dtype=torch.uint8)
        own[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        if data:
            own[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.world)]
        try:
            self._group.allgather([every], [own]).wait()
        except RuntimeError as error:
            raise RanksError(f"a rank did not take part: {_first_line(error)}") from error
        packed = [part.numpy().tobytes() for part in every]
        return [part[8 : 8 + int.from_bytes(part[:8], "little")].decode() for part in packed]


def _meet(store: Any, place: Position, terms: str) -> None:
    """Say that this rank is here, and ask until all others are."""
    store.set(str(place.rank), terms)
    deadline = time.monotonic() + PATIENCE_SECONDS
    missing = [rank for rank in range(place.world) if rank != place.rank]
    while missing:
        missing = [rank for rank in missing if not store.check([str(rank)])]
        if not missing:
            break
        if time.monotonic() > deadline:
            raise RanksError(
                f'{_named(missing)} did not call watch(..., ranks="merge") within {PATIENCE_SECONDS:.0f} s; every '
                'rank must, with the same arguments; ranks="first" lets rank 0 watch alone'
            )
        time.sleep(_ASK_EVERY_SECONDS)
    for rank in range(place.world):
        others = store.get(str(rank)).decode()
        if others != terms:
            raise ConfigError(
                f'ranks="merge": rank {rank} watches with {others}, rank {place.rank} with {terms}; allowed is the '
                "same on every rank"
            )


def _named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
