"""Which steps are measured, and for which of them histograms are written."""

from __future__ import annotations

__all__ = ["Schedule"]


class Schedule:
    """Steps 0, N, 2N ... of two intervals.

    Args:
        interval: Steps between histograms, above zero.
        scalar_interval: Steps between samples for scalars; where it is larger, `interval` counts.

    Example:
        >>> schedule = Schedule(interval=4, scalar_interval=3)
        >>> [step for step in range(9) if schedule.is_sampled(step)]
        [0, 3, 4, 6, 8]
    """

    def __init__(self, interval: int, scalar_interval: int) -> None:
        self._interval = interval
        self._scalar_interval = min(scalar_interval, interval)

    def is_sampled(self, step: int) -> bool:
        """Whether a step is measured."""
        return step % self._scalar_interval == 0 or step % self._interval == 0

    def has_histograms(self, step: int) -> bool:
        """Whether the histograms of a step are written."""
        return step % self._interval == 0

    def next_sampled(self, step: int) -> int:
        """The first step from this one on that is measured."""
        return min(-(-step // interval) * interval for interval in (self._scalar_interval, self._interval))
