"""Several tensors, or parts of a large one, measured at the same time by as many threads as torch computes with.

The parts depend on the size of the tensor alone, so that its sketch is the same to the bit with any number of threads.
The threads live for the call: none has to be told of a fork, or to be ended. On two cores that are shared with others
to start one took up to half a millisecond, in which 600,000 elements are measured: 10 million took 0.9 of the time in
two threads, 40 million 0.66. So each takes the next part when it is done with one, and who starts late does less.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["PART", "WORTHWHILE", "each", "parts_of"]

PART = 1 << 23
"""Elements of a part, at most: less of one tensor is not worth a thread."""

WORTHWHILE = 1 << 20
"""Elements for each of several threads, at least, where they are of many tensors: those of a model are measured twice a
step, and what a thread takes to start is less than it saves."""

_Part = TypeVar("_Part")
_Found = TypeVar("_Found")


def parts_of(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of a contiguous tensor, of about the same size.

    Example:
        >>> [part.numel() for part in parts_of(torch.empty(10_000_000))]
        [5000000, 5000000]
    """
    size = tensor.numel()
    many = -(-size // PART)
    return tensor.view(-1).split(-(-size // many)) if many > 1 else (tensor,)


def each(function: Callable[[_Part], _Found], parts: Sequence[_Part], most: int | None = None) -> list[_Found]:
    """What a function gives for each part, in their order.

    Args:
        function: Called from several threads; where it keeps the interpreter lock, several are slower than one.
        parts: Any number.
        most: Threads that are worthwhile, the caller's among them, which is there in any case; without it, one for each
            part.

    Raises:
        Exception: What the function raised.
    """
    # A thread that starts while the interpreter ends waits for its lock for ever, and with it who started it.
    worthwhile = len(parts) if most is None else min(len(parts), most)
    many = 1 if sys.is_finalizing() else min(torch.get_num_threads(), worthwhile)
    found: dict[int, _Found] = {}
    left = iter(range(len(parts)))

    def work() -> None:
        for place in left:
            found[place] = function(parts[place])

    def help_along() -> None:
        with contextlib.suppress(Exception):  # the caller meets it again
            work()

    helpers: list[threading.Thread] = []
    try:
        for _ in range(1, many):
            helpers.append(threading.Thread(target=help_along, name="instrument-measure", daemon=True))
            try:
                helpers[-1].start()
            except RuntimeError:  # the system has no more threads
                break
        work()
    finally:
        collections.deque(left, maxlen=0)  # where this one was called away, nobody begins another part
        _join(helpers)
    return [found[place] if place in found else function(part) for place, part in enumerate(parts)]


def _join(helpers: Sequence[threading.Thread]) -> None:
    """Return when all have ended: they read memory that is the caller's, whom Ctrl-C may call away."""
    interrupt: KeyboardInterrupt | None = None
    for helper in helpers:
        while helper.is_alive():
            try:
                helper.join()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt
