"""A sink before the sink: records are merged over the ranks in the background, and rank 0 writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from instrument.errors import RanksError
from instrument.record.buffer import StepRecord
from instrument.record.packing import BYTES_PER_SKETCH
from instrument.record.ranks.group import PATIENCE_SECONDS
from instrument.record.ranks.merging import RecordMerger
from instrument.record.worker import Worker
from instrument.record.writer import Built, RecordSink

__all__ = ["MergingSink"]

LOOK_PATIENCE_SECONDS = 1.0
"""How long a look at the history waits for other ranks. One that only rank 0 takes must not wait for a record that
another rank closes when it goes on, since that may be waiting for rank 0 in a collective of the training."""

FLUSH_PATIENCE_SECONDS = 10.0
"""The same for flushing; below the patience of the reductions, so that they outlast it."""


class MergingSink:
    """Merges each record over the ranks before it is written.

    Where a rank is gone or at another step, that is told once, and from then on each rank keeps its own records.

    Args:
        inner: What writes merged records; None on the ranks that do not write.
        merger: Merges a record.
        history: Merged records kept.
        tell: Told in one sentence when merging comes to its end early.
    """

    def __init__(
        self, inner: RecordSink | None, merger: RecordMerger, history: int, tell: Callable[[str], None]
    ) -> None:
        self.history: deque[StepRecord] = deque(maxlen=history)
        """The last merged records, oldest first."""
        self.on_merged: Callable[[StepRecord, bool], None] = lambda record, histograms: None
        """Given each merged record whose scalars are written, and whether its histograms are."""
        self._inner = inner
        self._merger: RecordMerger | None = merger
        self._tell = tell
        self._worker = Worker("instrument-ranks", self._stop)

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Merge a record and write it; returns at once."""
        self._worker.submit(lambda: self._write(record, scalars, histograms), record.held)

    def _write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        if self._merger is not None:
            try:
                record = self._merger.merge(record)
            except Exception as error:
                self._stop(error)
        self._keep(record)
        if self._inner is not None:
            self._inner.write(record, scalars, histograms)
        if scalars:
            self.on_merged(record, histograms)

    def _keep(self, record: StepRecord) -> None:
        if self.history and self.history[-1].step == record.step:  # a second optimizer came late
            record = self.history.pop().joined(record)
        self.history.append(record)

    def _stop(self, error: Exception) -> None:
        self._merger = None
        reason = str(error) if isinstance(error, RanksError) else f"{type(error).__name__}: {error}"
        self._tell(f"sketches are no longer merged over the ranks: {reason}; what follows is of this rank alone")

    def scalar(self, tag: str, number: float, step: int) -> None:
        """Write a scalar after the records before it; returns at once."""
        inner = self._inner
        if inner is not None:
            self._worker.submit(lambda: inner.scalar(tag, number, step))

    @property
    def seconds(self) -> float:
        """Time of the processor that the writer's thread has taken so far; that of merging is not in it."""
        return self._inner.seconds if self._inner is not None else 0.0

    def values(self, build: Callable[[], Built]) -> None:
        """Write what is built after the records before it; returns at once. On ranks that do not write, nothing."""
        inner = self._inner
        if inner is None:
            return
        if self._worker.is_current:  # what was made of the record that has just been written belongs to it
            inner.values(build)
        else:
            self._worker.submit(lambda: inner.values(build), BYTES_PER_SKETCH)

    def records(self) -> tuple[StepRecord, ...]:
        """The merged records, oldest first; the last may be missing where other ranks are not that far."""
        self._worker.flush(LOOK_PATIENCE_SECONDS)
        return tuple(self.history)

    def flush(self) -> None:
        """Return when what was written is merged, and on disk if the writer is ours; told where ranks lag behind."""
        if not self._worker.flush(FLUSH_PATIENCE_SECONDS):
            self._tell(
                f"another rank has not reached this step within {FLUSH_PATIENCE_SECONDS:.0f} s of flush(): its record "
                "is written when it has; call flush() on every rank"
            )
        if self._inner is not None:
            self._inner.flush()

    def close(self) -> None:
        """Flush, and close the writer if it is ours."""
        self._worker.close(2 * PATIENCE_SECONDS)
        if self._inner is not None:
            self._inner.close()
