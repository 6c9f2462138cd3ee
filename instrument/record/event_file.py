"""An event file that survives: full disk, vanished directory, fork, and exit without a word.

Records are appended one behind the other, so that after a kill at any moment the file can be read up to the last whole
one. What cannot be written waits in memory and is tried again with the next record; a partial write is cut off first,
since TensorBoard reads nothing behind a torn record.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections import deque
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata

from instrument.errors import warn_quietly
from instrument.record.events import Part, framed
from instrument.record.runs import EVENT_FILE_PART

__all__ = ["EventFile"]

MAX_BACKLOG_BYTES = 64 << 20
"""What cannot be written may take this much memory; beyond, the oldest is given up."""

CHUNK_BYTES = 256 << 10
"""What is given to the kernel at once. Where the page cache takes a write of 2 MB as one piece of memory, looking for
that and clearing it took 1 to 8 ms, and eight of these writes 0.5 ms, on ext4."""

_numbers = itertools.count()


class EventFile:
    """An event file in a directory; used by one thread at a time.

    Args:
        directory: Made where it does not exist.
        suffix: Added to the name of the file.
        start_step: Step of the START record, from which on older points of the same run are void; None where
            this file goes on beside others.

    Raises:
        OSError: The directory or the file cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], suffix: str = "", start_step: int | None = None) -> None:
        self.directory = Path(directory)
        self._suffix = suffix
        self._backlog: deque[tuple[Part, ...]] = deque()
        self._backlog_bytes = 0
        self._is_failing = False
        self.lost = 0
        """Records given up because they could not be written."""
        self._open(start_step)

    def _open(self, start_step: int | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._pid = os.getpid()
        # Files of a run are read in the order of their names: the time comes first. The last part is ours alone:
        # torch's own writer counts from 0 as well, and would empty a file of ours that has the name it wants.
        name = f"events.out.{EVENT_FILE_PART}.{int(time.time()):010d}.{socket.gethostname()}.{self._pid}"
        self.path = self.directory / f"{name}.{next(_numbers)}.instrument{self._suffix}"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._good = 0
        header = Event(
            wall_time=time.time(),
            file_version="brain.Event:2",
            source_metadata=SourceMetadata(writer="instrument"),
        )
        data = framed(header.SerializeToString())
        if start_step is not None:
            start = Event(wall_time=time.time(), step=start_step, session_log=SessionLog(status=SessionLog.START))
            data += framed(start.SerializeToString())
        try:
            self._append(data)
        except OSError:
            self._close_file()
            self.path.unlink(missing_ok=True)
            raise

    @property
    def is_ours(self) -> bool:
        """Whether this process, and not one that it was forked from, opened the file."""
        return os.getpid() == self._pid

    def write(self, *parts: Part) -> None:
        """Append a serialised event, given in parts, or keep it until that is possible; never raises."""
        self._backlog.append(framed(*parts))
        self._backlog_bytes += _size(self._backlog[-1])
        try:
            self._write_backlog()
        except OSError as error:
            self._fail(error)

    def retry(self) -> None:
        """Try once more to write what waits; never raises."""
        if self._backlog:
            try:
                self._write_backlog()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Write what waits and close the file; says so where something is lost for good."""
        if not self.is_ours:
            return
        self.retry()
        self.lost += len(self._backlog)
        self._backlog.clear()
        self._backlog_bytes = 0
        if self.lost:
            warn_quietly(f"{self.lost} records could not be written to {self.directory} and are lost")
        self._close_file()

    def _write_backlog(self) -> None:
        if not self.is_ours:
            # A forked child: the file is its parent's. It goes on in a file of its own, without a START record.
            self._backlog = deque([self._backlog[-1]])
            self._backlog_bytes = _size(self._backlog[0])
            self._close_file()
            self._open(None)
        elif self._has_vanished():
            self._close_file()
            self._open(None)
            warn_quietly(f"the event file in {self.directory} has vanished; writing goes on in {self.path.name}")
        while self._backlog:
            self._append(self._backlog[0])
            self._backlog_bytes -= _size(self._backlog.popleft())
        self._is_failing = False

    def _append(self, parts: tuple[Part, ...]) -> None:
        """Append what was framed whole or not at all."""
        try:
            for part in parts:
                view = memoryview(part)  # type: ignore[arg-type]  # NumPy tells of its buffers from Python 3.12 on
                while view:
                    view = view[os.write(self._file, view[:CHUNK_BYTES]) :]
        except BaseException:  # Ctrl-C too, where this runs in the main thread at exit
            if self._file >= 0:
                os.ftruncate(self._file, self._good)
            raise
        self._good += _size(parts)

    def _has_vanished(self) -> bool:
        if self._file < 0:
            return True
        try:
            return self.path.stat().st_ino != os.fstat(self._file).st_ino
        except FileNotFoundError:
            return True

    def _close_file(self) -> None:
        file, self._file = getattr(self, "_file", -1), -1
        if file >= 0:
            os.close(file)

    def _fail(self, error: OSError) -> None:
        # What waits is to take the memory that is counted, and arrays are views of up to twice as much.
        self._backlog[-1] = tuple(map(bytes, self._backlog[-1]))
        while self._backlog_bytes > MAX_BACKLOG_BYTES:
            self._backlog_bytes -= _size(self._backlog.popleft())
            self.lost += 1
        if not self._is_failing:
            self._is_failing = True
            warn_quietly(
                f"events cannot be written to {self.directory}: {error}; they are kept in memory and tried again, "
                "training goes on"
            )


def _size(parts: tuple[Part, ...]) -> int:
    return sum(map(len, parts))
