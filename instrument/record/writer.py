"""Writers: our own `SummaryWriter`, and what stands before a writer of the user's.

Ours **is a** `torch.utils.tensorboard.SummaryWriter`, so that people log their own loss to it, with another file
behind: checksums in C instead of pure Python, one event for all tags of a step, a queue that never blocks the
training thread, and nothing lost at exit.
"""

from __future__ import annotations

import io
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

from instrument.errors import ConfigError, keep_interrupt, warn_quietly
from instrument.record.buffer import StepRecord
from instrument.record.event_file import EventFile
from instrument.record.events import Part
from instrument.record.losses import Losses
from instrument.record.packing import BYTES_PER_SKETCH
from instrument.record.values import histogram_slices, scalar_values
from instrument.record.wire import ScalarLayout, event_parts, histogram_values
from instrument.record.worker import Worker

__all__ = ["ForeignSink", "OwnSink", "RecordSink", "SummaryWriter", "sink_for"]

EXIT_PATIENCE_SECONDS = 60.0
"""How long closing waits for a disk that does not answer."""

TEXT_PLUGIN = "text"
TEXT_SUFFIX = "/text_summary"
"""What torch adds to the tag of a text."""

REQUIRED_METHODS = ("add_scalar", "add_histogram_raw")

Built: TypeAlias = "Iterable[tuple[int, list[Summary.Value]]]"
"""Step and values of each event that was built in the background."""


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
        self.add_built(lambda: ((event.SerializeToString(),),), event.ByteSize())

    def add_built(self, build: Callable[[], Iterable[Iterable[Part]]], size: int) -> None:
        """Write events that are built in the writer's thread, each in parts."""
        if self._is_closed:
            self.reopen()
        file = self._file

        def write() -> None:
            for data in build():
                file.write(*data)

        self._worker.submit(write, size)

    @property
    def seconds(self) -> float:
        return self._worker.seconds

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
        self.losses = Losses()
        """The training loss, where the user logs one."""
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
            weakref.finalize(self, _close_at_exit, own.file_writer.event_writer.close)
        writer: _FileWriter = own.file_writer
        return writer

    def flush(self) -> None:
        """Return when everything added before is in the file."""
        own: Any = self  # torch declares its attributes as None
        if own.all_writers is not None:
            super().flush()

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None, *args: Any, **more: Any) -> None:
        """Add a scalar, as in torch; one that is called a loss is looked at for spikes too."""
        super().add_scalar(tag, scalar_value, global_step, *args, **more)
        if global_step is not None and self.losses.wants(tag):
            value = scalar_value.detach() if hasattr(scalar_value, "detach") else scalar_value
            self.losses.add(tag, int(global_step), float(value))

    def add_built(self, build: Callable[[], Iterable[Iterable[Part]]], size: int) -> None:
        """Add events that are built in the writer's thread.

        Args:
            build: Gives each serialised `Event`, in parts.
            size: Bytes that wait with it, roughly.
        """
        self._get_file_writer().event_writer.add_built(build, size)

    @property
    def seconds(self) -> float:
        """Time of the processor that the writer's thread has taken so far."""
        own: Any = self  # torch declares its attributes as None
        return own.file_writer.event_writer.seconds if own.file_writer is not None else 0.0


class RecordSink(Protocol):
    """Where step records go."""

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Write the scalars of a record, its histograms, or both; returns at once."""

    def scalar(self, tag: str, number: float, step: int) -> None:
        """Write a scalar; returns at once."""

    def values(self, build: Callable[[], Built]) -> None:
        """Write scalars, texts and images that are built in the background; returns at once."""

    def flush(self) -> None:
        """Return when what was written is with the writer, and on disk if the writer is ours."""

    def close(self) -> None:
        """Flush, and close the writer if it is ours."""

    @property
    def seconds(self) -> float:
        """Time of the processor that the background has taken so far."""


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
        self._layout = ScalarLayout(())

    def write(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        """Write a record; the event is built in the writer's thread."""

        def build() -> Iterable[Iterable[Part]]:
            return (event_parts(record.wall_time, record.step, self._values(record, scalars, histograms)),)

        self._writer.add_built(build, record.held)

    def _values(self, record: StepRecord, scalars: bool, histograms: bool) -> Iterator[Part]:
        if scalars:
            tags, numbers = scalar_values(record, self._counted)
            if tags is not self._layout.tags and tags != self._layout.tags:
                self._layout = ScalarLayout(tags)
            yield self._layout.values(numbers)
        if histograms:
            for part in histogram_slices(record):
                yield histogram_values(part)

    def scalar(self, tag: str, number: float, step: int) -> None:
        """Write a scalar."""
        self._writer.add_scalar(tag, number, step)

    @property
    def seconds(self) -> float:
        """Time of the processor that the writer's thread has taken so far."""
        return self._writer.seconds

    def values(self, build: Callable[[], Built]) -> None:
        """Write what is built, an event a step."""

        def events() -> Iterable[Iterable[Part]]:
            for step, values in build():
                found = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
                yield (found.SerializeToString(),)

        self._writer.add_built(events, BYTES_PER_SKETCH)

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
            if scalars:
                for tag, number in zip(*scalar_values(record, self._counted), strict=True):
                    self._writer.add_scalar(tag, float(number), record.step)
            if histograms:
                for part in histogram_slices(record):
                    for tag, (low, high, num, total, squares), limits, counts in part.rows():
                        self._writer.add_histogram_raw(
                            tag,
                            min=low,
                            max=high,
                            num=num,
                            sum=total,
                            sum_squares=squares,
                            bucket_limits=limits,
                            bucket_counts=counts,
                            global_step=record.step,
                        )

        self._worker.submit(add, record.held)

    def scalar(self, tag: str, number: float, step: int) -> None:
        """Write a scalar."""
        self._worker.submit(lambda: self._writer.add_scalar(tag, number, step))

    @property
    def seconds(self) -> float:
        """Time of the processor that our thread has taken so far."""
        return self._worker.seconds

    def values(self, build: Callable[[], Built]) -> None:
        """Write what is built, one call a tag; what the writer has no method for is left out."""

        def add() -> None:
            for step, values in build():
                for value in values:
                    self._add(value, step)

        self._worker.submit(add, BYTES_PER_SKETCH)

    def _add(self, value: Any, step: int) -> None:
        plugin = value.metadata.plugin_data.plugin_name
        if value.HasField("simple_value"):
            self._writer.add_scalar(value.tag, value.simple_value, step)
        elif plugin == TEXT_PLUGIN and callable(getattr(self._writer, "add_text", None)):
            self._writer.add_text(value.tag.removesuffix(TEXT_SUFFIX), value.tensor.string_val[0].decode(), step)
        elif value.HasField("image") and callable(getattr(self._writer, "add_image", None)):
            image = Image.open(io.BytesIO(value.image.encoded_image_string)).convert("RGB")
            self._writer.add_image(value.tag, np.asarray(image), step, dataformats="HWC")

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


def _close_at_exit(close: Callable[[], None]) -> None:
    close()
    keep_interrupt()


def _report(error: Exception) -> None:
    warn_quietly(f"an event could not be written: {type(error).__name__}: {error}; training goes on")
