"""The checkup of a live watch: records go to the doctor, and what comes of it to the writer, the console and a file.

Everything here but `add` runs in the writer's thread, or in that of whoever asks for findings.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from instrument.config import Config
from instrument.diagnose.doctor import Doctor, Examination
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.flight import Accident, FlightRecorder
from instrument.diagnose.report import Report
from instrument.diagnose.summaries import Summaries
from instrument.diagnose.units import UnitStatus, UnitWindows
from instrument.errors import warn_quietly
from instrument.record.buffer import StepRecord
from instrument.record.writer import RecordSink
from instrument.watcher.notices import Notices

__all__ = ["Checkup"]


class Checkup:
    """Examines what a watch records.

    Args:
        config: The settings.
        sink: What is written through.
        directory: Where the flight recorder writes; None where the writer has no directory.
        loss_of: As of `Doctor`.
        notices: What could not be observed.
        on_non_finite: Called once, when the first NaN or Inf was found; in the background.
        strict: Whether faults are raised for whoever asks for findings.
    """

    def __init__(
        self,
        config: Config,
        sink: RecordSink,
        directory: str | None,
        loss_of: Callable[[int, int | None], float | None],
        notices: Notices,
        on_non_finite: Callable[[], None],
        strict: bool,
    ) -> None:
        self._sink = sink
        self._notices = notices
        self._on_non_finite = on_non_finite
        self._strict = strict
        self._pid = os.getpid()
        self._error: Exception | None = None
        self._has_failed = False
        self._had_non_finite = False
        self._doctor = Doctor(config, UnitWindows(config), loss_of=loss_of, strict=strict)
        self._summaries = Summaries(self._doctor, config, lambda: tuple(notices.texts))
        self._recorder = FlightRecorder(directory, config.non_finite_burst)

    def add(self, record: StepRecord, is_flush: bool) -> None:
        """Take a record; returns at once.

        Args:
            record: What was recorded of a step.
            is_flush: Whether its histograms are written, so that units may be judged.
        """
        self._doctor.add(record, is_flush)
        # Not of later steps, though they may wait already: a run is read one step after another.
        self._sink.values(functools.partial(self._values, record))

    def findings(self) -> tuple[Finding, ...]:
        """Everything found so far, oldest first; none in a process that was forked from the one that watches."""
        if os.getpid() != self._pid:  # a lock that another thread held there is never released here
            return ()
        return self._doctor.findings()

    def units(self) -> dict[str, UnitStatus]:
        """The state of the units of each module; nothing in a process that was forked from the one that watches."""
        return self._doctor.units() if os.getpid() == self._pid else {}

    def report(self, records: Iterable[StepRecord]) -> Report:
        """The report as it is now."""
        if os.getpid() != self._pid:
            return Report()
        return Report.of_watch(self._doctor, records, self._notices.texts, self._recorder.accident)

    def close(self, error: BaseException | None) -> None:
        """Judge units once more and write the last health table.

        Args:
            error: The exception that ended the training, where one did.
        """

        def finish() -> Iterator[tuple[int, list[Any]]]:
            yield from self._values()
            self._guarded(lambda: self._end(error))
            self._guarded(self._doctor.judge)
            yield from self._values()

        self._sink.values(finish)

    def raise_error(self) -> None:
        """In strict mode raise what went wrong in the background; once."""
        self._doctor.raise_error()
        error, self._error = self._error, None
        if error is not None and self._strict:
            raise error

    def _values(self, record: StepRecord | None = None) -> Iterator[tuple[int, list[Any]]]:
        """Examine what waits; the values for each step up to that of a record, which is packed then."""
        examinations: list[Examination] = []
        step = record.step if record is not None else None
        self._guarded(lambda: examinations.extend(self._doctor.catch_up(step)))
        for examination in examinations:
            values: list[Any] = []
            self._guarded(functools.partial(self._after, examination, values))
            if values:
                yield examination.reading.step, values
        if record is not None:
            self._guarded(record.pack)

    def _after(self, examination: Examination, values: list[Any]) -> None:
        """Tell of an examination; add to the values for its step."""
        for finding in examination.told:
            if finding.level >= Level.CRIT:
                warn_quietly(str(finding))
            if finding.diagnostic == "non_finite" and not self._had_non_finite:
                self._had_non_finite = True
                self._on_non_finite()
        # Later records may have been examined already, when somebody asked for findings.
        so_far = tuple(reading for reading in self._doctor.readings if reading.step <= examination.reading.step)
        self._recorder.see(so_far, examination.told)
        values += self._summaries.of(examination)

    def _end(self, error: BaseException | None) -> None:
        readings = tuple(self._doctor.readings)
        if isinstance(error, Exception) and readings:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self._recorder.happened(
                Accident("exception", readings[-1].step, f"the training ended with {words}"), readings
            )
        self._recorder.close()

    def _guarded(self, job: Callable[[], None]) -> None:
        """Do a job; what it raises is told once and ends nothing."""
        try:
            job()
        except Exception as error:
            self._error = error
            if not self._has_failed:
                self._has_failed = True
                warn_quietly(f"the checkup failed with {type(error).__name__}: {error}; training goes on")
