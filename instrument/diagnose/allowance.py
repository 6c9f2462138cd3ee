"""How much of the training's time may go into what people look at now and then, and need not find anew each flush."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

__all__ = ["Allowance"]

SHARE = 0.005
"""Of the time of the steps, how much each allowance is. Where a step of 400 layers takes 75 ms, their unit maps would
take as long as 60 steps, and their health table a seventieth of the training."""

FIRST_SECONDS = 0.1
"""What may be spent after the first flush, and never saved up beyond: the maps of ten layers or so, or the health table
of thousands."""


class Allowance:
    """Time that something may take while a training goes on; used by one thread at a time.

    Args:
        clock: Gives seconds.

    Example:
        >>> allowance = Allowance(iter([0.0, 0.5]).__next__)
        >>> with allowance.spending():
        ...     "half a second"
        'half a second'
        >>> allowance.is_left, allowance.earn(200.0), allowance.is_left
        (False, None, True)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._left = FIRST_SECONDS
        """Seconds; below zero where the last spending took longer."""

    def earn(self, seconds: float) -> None:
        """Steps have taken so many seconds since this was last called."""
        earned = SHARE * seconds
        self._left = min(self._left + earned, max(FIRST_SECONDS, earned))

    @property
    def is_left(self) -> bool:
        """Whether anything may be spent."""
        return self._left > 0.0

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """What is done in this context is taken from the allowance."""
        start = self._clock()
        try:
            yield
        finally:
            self._left -= self._clock() - start
