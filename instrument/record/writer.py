"""Writers: our own `SummaryWriter`, and what stands before a writer of the user's.

Ours **is a** `torch.utils.tensorboard.SummaryWriter`, so that people log their own loss to it, with another file
behind: checksums in C instead of pure Python, one event for all tags of a step, a queue that never blocks the
training thread, and nothing lost at exit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

from instrument.errors import ConfigError, warn_quietly
from instrument.record.buffer import StepRecord
from instrument.record.event_file import EventFile
from instrument.record.values import record_values
from instrument.record.worker import Worker

__all__ = ["ForeignSink", "OwnSink", "RecordSink", "SummaryWriter", "sink_for"]

EXIT_PATIENCE_SECONDS = 60.0
"""How long closing waits for a disk that does not answer."""

BYTES_PER_SKETCH = 4096
"""Memory of a sketch that waits to be written, roughly."""

REQUIRED_METHODS = ("add_scalar", "add_histogram_raw")


class _Events:
    """Stands where torch has its `EventFileWriter`: the same methods over our file and our thread."""

    def __init__(self, logdir: str, suffix: str, start_step: int | None) -> None:
        self._logdir = logdir
        self._suffix = suffix
        self._is_closed = False
        self._file = EventFile(logdir, suffix, start_step)
        self._worker = Worker("instrument-writer", _report)

    def get_logdir(self) -> str:
        return self._logdir

    def add_event(self, event: Any) -> None:
        self.add_built(lambda: event, event.ByteSize())

    def add_built(self, build: Callable[[], Any], size: int) -> None:
        """Write an event that is built in the writer's thread."""
        if self._is_closed:
            self.reopen()
        file = self._file
        self._worker.submit(lambda: file.write(build().SerializeToString()), size)

    def flush(self) -> None:
        self._worker.submit(self._file.retry)
        if not self._worker.flush(EXIT_PATIENCE_SECONDS):
            warn_quietly(f"the disk of {self._logdir} has not answered for {EXIT_PATIENCE_SECONDS:.0f} s")

    def close(self) -> None:
        if not self._is_closed and (self._worker.is_ours or self._file.is_ours):
            self._is_closed = True
            self._worker.submit(self._file.close)
            self._worker.close(EXIT_PATIENCE_SECONDS)

    def reopen(self) -> None:
        if self._is_closed:
            self._is_closed = False
            self._file = EventFile(self._logdir, self._suffix)


class _FileWriter(FileWriter):
    """torch's `FileWriter` over our events."""

    def __init__(self, logdir: str, suffix: str, start_step: int | None) -> None:
        self.event_writer = _Events(logdir, suffix, start_step)


class SummaryWriter(TorchSummaryWriter):
    """A `torch.utils.tensorboard.SummaryWriter` that never blocks training and loses nothing at exit.

    Args:
        log_dir: Directory of the event files; made where it does not exist.
        comment: As in torch.
        purge_step: Step from which on points written to this directory earlier are void; 0 where not given.
        max_queue: Taken for compatibility; the queue is bounded by memory.
        flush_secs: Taken for compatibility; records are written when they come.
        filename_suffix: Added to the names of event files.

    Raises:
        OSError: The directory or the event file cannot be made.

    Example:
        >>> import tempfile
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     writer.add_scalar("loss", 0.5, 0)
    """

    def __init__(
        self,
        log_dir: Any = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
    ) -> None:
        # Readers in Python ignore the first START of a run, so that a later one, on resuming, purges only when
        # the first file has one too.
        purge_step = 0 if purge_step is None else purge_step
        super().__init__(log_dir, comment, purge_step, max_queue, flush_secs, filename_suffix)
        own: Any = self  # torch declares its attributes as None
        if not isinstance(own.file_writer, _FileWriter):  # made by a method of torch's that has another name
            own.file_writer.close()
            own.file_writer, own.purge_step = None, purge_step
            self._get_file_writer()

    def _get_file_writer(self) -> _FileWriter:
        """Make the writer of a file where there is none: at first, and after `close`."""
        own: Any = self  # torch declares its attributes as None
        if own.file_writer is None:
            logdir = str(self.log_dir)
            own.file_writer = _FileWriter(logdir, self.filename_suffix, self.purge_step)
            own.purge_step = None
            own.all_writers = {logdir: own.file_writer}
            weakref.finalize(self, own.file_writer.event_writer.close)
        writer: _FileWriter = own.file_writer
        return writer

    def flush(self) -> None:
        """Return when everything added before is in the file."""
        own: Any = self  # torch declares its attributes as None
        if own.all_writers is not None:
            super().flush()

    def add_built(self, build: Callable[[], Any], size: int) -> None:
        """Add an event that is built in the writer's thread.

        Args:
            build: Gives the `Event`.
            size: Bytes that wait with it, roughly.
        """
        self._get_file_writer().event_writer.add_built(build, size)


class RecordSink(Protocol):
    """Where step records go."""

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Write the scalars of a record, its histograms, or both; returns at once."""

    def text(self, tag: str, build: Callable[[], str], step: int) -> None:
        """Write a text that is built in the background; returns at once."""

    def flush(self) -> None:
        """Return when what was written is with the writer, and on disk if the writer is ours."""

    def close(self) -> None:
        """Flush, and close the writer if it is ours."""


def sink_for(writer: Any, is_users: bool = True) -> RecordSink:
    """What step records are written through.

    Args:
        writer: Our `SummaryWriter`, or anything with the methods of one.
        is_users: Whether the writer is the user's, to be flushed but never closed.

    Returns:
        A sink.

    Raises:
        ConfigError: The writer lacks a method.
    """
    if isinstance(writer, SummaryWriter):
        return OwnSink(writer, is_users)
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(writer, name, None))]
    if missing:
        raise ConfigError(
            f"writer is {writer!r}, which has no {' and no '.join(missing)}; allowed is anything with the methods "
            "of torch.utils.tensorboard.SummaryWriter"
        )
    return ForeignSink(writer)


class OwnSink:
    """Writes records to our own writer, one event each.

    Args:
        writer: The writer.
        is_users: Whether it is the user's, to be flushed but never closed.
    """

    def __init__(self, writer: SummaryWriter, is_users: bool) -> None:
        self._writer = writer
        self._is_users = is_users
        self._counted: set[str] = set()

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Write a record; the event is built in the writer's thread."""

        def build() -> Any:
            values = record_values(record, scalars, histograms, self._counted)
            return Event(wall_time=record.wall_time, step=record.step, summary=Summary(value=values))

        self._writer.add_built(build, BYTES_PER_SKETCH * len(record))

    def text(self, tag: str, build: Callable[[], str], step: int) -> None:
        """Write a text."""
        from torch.utils.tensorboard.summary import text

        self._writer.add_built(lambda: Event(step=step, summary=text(tag, build())), BYTES_PER_SKETCH)

    def flush(self) -> None:
        """Return when everything is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and close the writer unless it is the user's."""
        if self._is_users:
            self._writer.flush()
        else:
            self._writer.close()


class ForeignSink:
    """Writes records through the public methods of a user's writer, in a thread of ours.

    Args:
        writer: Anything with the methods of a `SummaryWriter`; it is never closed here.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._counted: set[str] = set()
        self._has_failed = False
        self._worker = Worker("instrument-writer", self._fail)

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Write a record, one call a tag."""

        def add() -> None:
            for value in record_values(record, scalars, histograms, self._counted):
                if value.HasField("histo"):
                    histogram = value.histo
                    self._writer.add_histogram_raw(
                        value.tag,
                        min=histogram.min,
                        max=histogram.max,
                        num=histogram.num,
                        sum=histogram.sum,
                        sum_squares=histogram.sum_squares,
                        bucket_limits=list(histogram.bucket_limit),
                        bucket_counts=list(histogram.bucket),
                        global_step=record.step,
                    )
                else:
                    self._writer.add_scalar(value.tag, value.simple_value, record.step)

        self._worker.submit(add, BYTES_PER_SKETCH * len(record))

    def text(self, tag: str, build: Callable[[], str], step: int) -> None:
        """Write a text, where the writer takes texts."""
        if callable(getattr(self._writer, "add_text", None)):
            self._worker.submit(lambda: self._writer.add_text(tag, build(), step), BYTES_PER_SKETCH)

    def flush(self) -> None:
        """Return when the writer was given everything and was flushed itself."""
        if callable(getattr(self._writer, "flush", None)):
            self._worker.submit(self._writer.flush)
        if not self._worker.flush(EXIT_PATIENCE_SECONDS):
            warn_quietly(f"the writer given has not answered for {EXIT_PATIENCE_SECONDS:.0f} s")

    def close(self) -> None:
        """Flush, and leave the writer to the user."""
        self.flush()
        self._worker.close(EXIT_PATIENCE_SECONDS)

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            warn_quietly(f"the writer given raised {type(error).__name__}: {error}; training goes on")


def _report(error: Exception) -> None:
    warn_quietly(f"an event could not be written: {type(error).__name__}: {error}; training goes on")
