"""One background thread that does jobs in order, so that training never waits for a disk or a writer.

A `SimpleQueue` takes jobs: putting one never blocks, and is safe even from a weak reference's callback, which
may run anywhere, in the middle of our own calls too. The thread is a daemon; whoever owns the worker flushes it
when the interpreter exits. In a forked child the thread does not exist; there the worker begins anew.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

from instrument.errors import warn_quietly
from instrument.record.turns import TURNS, wait_by

__all__ = ["Worker"]

MAX_PENDING_BYTES = 256 << 20
"""Jobs that wait may hold this much; beyond, new ones are given up and counted."""


AT_LEISURE = 4
"""Jobs that may wait before the worker waits for nobody: those of two steps."""


class Worker:
    """Does jobs in a background thread, one after another.

    Args:
        name: Name of the thread.
        on_error: Told of an exception in a job; it must not raise.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], None]) -> None:
        self._name = name
        self._on_error = on_error
        self.dropped = 0
        """Jobs given up because too many waited."""
        self.seconds = 0.0
        """Time of the processor that jobs have taken."""
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._draining = threading.RLock()
        self._submitted = 0
        self._done = 0

    @property
    def is_ours(self) -> bool:
        """Whether this process, and not one that it was forked from, gave jobs to the worker."""
        return os.getpid() == self._pid

    @property
    def is_current(self) -> bool:
        """Whether whoever asks is a job of this worker."""
        return threading.current_thread() is self._thread

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        """Have a job done; returns at once.

        Args:
            job: Called in the thread.
            size: Bytes that the job holds, roughly.
        """
        if not self.is_ours:
            self._begin()
        if self._submitted - self._done > MAX_PENDING_BYTES:
            self.dropped += 1
            if self.dropped == 1:
                warn_quietly(
                    f"{self._name} is so slow that {MAX_PENDING_BYTES >> 20} MiB wait; what comes now is lost, "
                    "training goes on"
                )
            return
        self._submitted += size
        self._queue.put((job, size))
        self._start()

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down: `flush` does the jobs itself
                return
            self._thread = thread

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all jobs submitted before are done.

        Args:
            timeout: Seconds to wait at most; without it, as long as it takes.

        Returns:
            Whether they are done; false in the worker's own thread, which cannot wait for itself.
        """
        if not self.is_ours or self.is_current:
            return False
        TURNS.end()
        if self._thread is None or not self._thread.is_alive():
            self._drain()
            return True
        # A bare lock: a signal's handler that flushes while a flush waits would find the one of an `Event` taken.
        done = threading.Lock()
        done.acquire()
        self._queue.put((done.release, 0))
        return done.acquire(timeout=-1 if timeout is None else timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Do what was submitted and end the thread; a job submitted later starts another.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether everything was done.
        """
        done = self.flush(timeout)
        thread, self._thread = self._thread, None
        if thread is not None and self.is_ours:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout)
        return done

    def _run(self) -> None:
        wait_by(self._wait)
        while True:
            item = self._queue.get()
            if item is None:
                return
            self._wait()
            self._do(*item)

    def _wait(self) -> None:
        """Leave the interpreter lock to a forward pass, unless much is to be done."""
        if self._queue.qsize() <= AT_LEISURE:
            TURNS.wait()

    def _drain(self) -> None:
        with self._draining:
            while True:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    return
                if item is not None:
                    self._do(*item)

    def _do(self, job: Callable[[], None], size: int) -> None:
        start = time.thread_time()
        try:
            job()
        except Exception as error:
            self._on_error(error)
        self.seconds += time.thread_time() - start
        self._done += size
