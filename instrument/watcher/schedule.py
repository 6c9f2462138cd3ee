"""Which steps are measured, and for which of them histograms are written.

A burst is a number of steps in a row that are all measured, after the first NaN or Inf. It is asked for in the
background, where that is found, and begins where the training thread makes ready for a step: within a step nothing
changes.
"""

from __future__ import annotations

__all__ = ["Schedule"]


class Schedule:
    """Steps 0, N, 2N ... of two intervals, which a budget may stretch.

    Args:
        interval: Steps between histograms, above zero.
        scalar_interval: Steps between samples for scalars; where it is larger, `interval` counts.

    Example:
        >>> schedule = Schedule(interval=4, scalar_interval=3)
        >>> [step for step in range(9) if schedule.is_sampled(step)]
        [0, 3, 4, 6, 8]
        >>> schedule.ask_for_burst(2)
        >>> schedule.begin_burst(9)
        >>> [step for step in range(9, 15) if schedule.is_sampled(step)]
        [9, 10, 12]
        >>> schedule.stretch(2)
        >>> [step for step in range(20, 50) if schedule.is_sampled(step)], schedule.histogram_interval
        ([24, 30, 36, 42, 48], 6)
    """

    def __init__(self, interval: int, scalar_interval: int) -> None:
        self._given = interval, min(scalar_interval, interval)
        self.histogram_interval, self.scalar_interval = self._given
        self._asked = 0
        self._burst = range(0)

    def stretch(self, factor: int) -> None:
        """Multiply the interval of scalars; that of histograms becomes its next multiple that is not below its own.

        Args:
            factor: What the interval given is multiplied by, from 1.
        """
        interval, scalar_interval = self._given
        self.scalar_interval = scalar_interval * factor
        self.histogram_interval = -(-interval // self.scalar_interval) * self.scalar_interval

    def ask_for_burst(self, count: int) -> None:
        """Have so many steps measured in a row; from any thread."""
        self._asked = count

    def begin_burst(self, step: int) -> None:
        """Begin the burst that was asked for, if one was, with this step."""
        if self._asked:
            self._burst = range(step, step + self._asked)
            self._asked = 0

    def is_sampled(self, step: int) -> bool:
        """Whether a step is measured."""
        return step % self.scalar_interval == 0 or step % self.histogram_interval == 0 or step in self._burst

    def has_histograms(self, step: int) -> bool:
        """Whether the histograms of a step are written."""
        return step % self.histogram_interval == 0

    def next_sampled(self, step: int) -> int:
        """The first step from this one on that is measured."""
        if step in self._burst:
            return step
        return min(-(-step // interval) * interval for interval in (self.scalar_interval, self.histogram_interval))
