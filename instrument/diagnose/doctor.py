"""The doctor: takes records, reads them, asks every diagnostic, and remembers what was said.

Taking a record costs the training thread an append. The examination is made in the background, or by whoever asks for
findings first; a lock keeps the two apart. A finished run is examined by the same code, reading by reading.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.diagnostics.registry import DIAGNOSTICS, ONCE, Diagnostic
from instrument.diagnose.findings import UNDATED, Finding, Standing
from instrument.diagnose.readings import NO_UNITS, ParameterTraits, Reading
from instrument.diagnose.units import UnitStatus, UnitWindows
from instrument.errors import warn_quietly
from instrument.record.buffer import StepRecord

__all__ = ["Doctor", "Examination"]

_Key = tuple[str, Site | None]


@dataclasses.dataclass(frozen=True)
class Examination:
    """What became of one record."""

    reading: Reading
    told: tuple[Finding, ...]
    """Findings that are new."""
    is_flush: bool
    """Whether units were judged, and histograms are written."""
    is_last: bool = False
    """Whether the training is over."""
    wall_time: float = 0.0
    """Seconds since 1970 at which the step ended."""


class _Seen:
    """When something was found last, and how bad it was when it was told.

    One for each, and changed: where gradients vanish, hundreds of findings come again each step.
    """

    __slots__ = ("level", "step")

    def __init__(self, finding: Finding) -> None:
        self.level = finding.level
        self.step = finding.step


class _Standing:
    """What a diagnostic found last, where that comes again."""

    __slots__ = ("active", "step", "undated")

    def __init__(self, undated: tuple[Finding, ...]) -> None:
        self.undated = undated
        self.active: dict[_Seen, Finding] = {}
        self.step = UNDATED


class Doctor:
    """Finds what is wrong in a training, step by step.

    Args:
        config: The thresholds.
        windows: Where units are judged; None for a finished run, whose readings say how units were.
        loss_of: Gives the training loss of a step, or of one before it that is after another; None where none is known.
        diagnostics: What is asked.
        strict: Whether a diagnostic that raises does so for whoever asks for findings.

    Example:
        >>> from instrument import measure
        >>> import torch
        >>> doctor = Doctor(Config(), None)
        >>> doctor.add(StepRecord(3, {"Activations/fc": measure(torch.tensor([float("nan")]))}, 0.0))
        >>> [(str(found.level), found.diagnostic, found.site.name, found.step) for found in doctor.findings()]
        [('CRIT', 'non_finite', 'fc', 3)]
    """

    def __init__(
        self,
        config: Config,
        windows: UnitWindows | None,
        *,
        loss_of: Callable[[int, int | None], float | None] = lambda step, since: None,
        diagnostics: Iterable[Diagnostic] = DIAGNOSTICS,
        strict: bool = False,
    ) -> None:
        self.readings: deque[Reading] = deque(maxlen=_longest(config))
        """The last readings, oldest first."""
        self._config = config
        self._windows = windows
        self._loss_of = loss_of
        self._diagnostics = list(diagnostics)
        self._strict = strict
        self._error: Exception | None = None
        self._lock = threading.RLock()
        self._waiting: deque[tuple[StepRecord, bool]] = deque()
        self._done: deque[Examination] = deque()
        self._told: list[Finding] = []
        self._seen: dict[_Key, _Seen] = {}
        self._active: dict[_Seen, Finding] = {}
        self._standing: dict[str, _Standing] = {}
        self._units: dict[str, UnitStatus] = {}
        self._judged_at: int | None = None

    def add(self, record: StepRecord, is_flush: bool = False) -> None:
        """Take a record; returns at once.

        Args:
            record: Of a step later than the last, or what a second optimizer adds to that.
            is_flush: Whether units may be judged after it: at most once in `scalar_interval` steps, since to judge
                them, draw them and write them down takes longer than everything else.
        """
        self._waiting.append((record, is_flush))

    def catch_up(self, step: int | None = None) -> list[Examination]:
        """Examine the records that wait.

        Args:
            step: The last step to tell of; without it, all.

        Returns:
            What became of each record since the last call, whoever had it examined.
        """
        with self._lock:
            self._examine_waiting()
            done = []
            while self._done and (step is None or self._done[0].reading.step <= step):
                done.append(self._done.popleft())
        return done

    def judge(self) -> None:
        """Judge units after the newest record, where that was not done; `catch_up` gives what becomes of it."""
        with self._lock:
            self._examine_waiting()
            if self._windows is not None and self.readings:
                newest = self.readings[-1]
                units = self._judged(self._windows, None, is_flush=True)
                reading = Reading(newest.step, {}, units, newest.loss, newest.parameters)
                told = self._examine(reading)
                self._done.append(Examination(reading, told, is_flush=True, is_last=True))

    def findings(self) -> tuple[Finding, ...]:
        """Everything found so far, each told once, oldest first.

        Raises:
            Exception: A diagnostic raised, in strict mode.
        """
        with self._lock:
            self._examine_waiting()
            self.raise_error()
            return tuple(self._told)

    def active(self) -> tuple[Finding, ...]:
        """What the newest reading still suffers from."""
        with self._lock:
            return tuple([f if f.step != UNDATED else f.on(seen.step) for seen, f in self._active.items()])

    def units(self) -> dict[str, UnitStatus]:
        """The state of the units of each module, by all records taken so far."""
        with self._lock:
            self._examine_waiting()
            return self._windows.status() if self._windows is not None else dict(self._units)

    def raise_error(self) -> None:
        """In strict mode raise what a diagnostic raised; once."""
        error, self._error = self._error, None
        if error is not None and self._strict:
            raise error

    def examine(self, reading: Reading) -> tuple[Finding, ...]:
        """Ask every diagnostic about a reading.

        Args:
            reading: Of a step later than the last; one of the same step joins that; one of an earlier step, where a
                run was resumed, makes everything from there on void.

        Returns:
            Findings that are new.
        """
        with self._lock:
            return self._examine(reading)

    def _examine_waiting(self) -> None:
        while self._waiting:
            record, is_flush = self._waiting.popleft()
            is_flush = is_flush and self._is_due(record.step)
            units: Mapping[str, UnitStatus] = NO_UNITS
            if self._windows is not None:
                units = self._judged(self._windows, record, is_flush)
            since = self.readings[-1].step if self.readings else None
            loss = self._loss_of(record.step, since if since != record.step else None)
            parameters: Mapping[str, ParameterTraits] = self.readings[-1].parameters if self.readings else {}
            reading = Reading.of_record(record, units, loss, parameters)
            self._done.append(Examination(reading, self._examine(reading), is_flush, wall_time=record.wall_time))

    def _is_due(self, step: int) -> bool:
        """Whether units are judged on a step; those of a run that was resumed begin anew."""
        before = self._judged_at
        if before is not None and before <= step < before + self._config.scalar_interval:
            return step == before  # what a second optimizer adds to it
        self._judged_at = step
        return True

    def _examine(self, reading: Reading) -> tuple[Finding, ...]:
        if reading.units:
            self._units = dict(reading.units)
        if self.readings and self.readings[-1].step > reading.step:
            self._go_back(reading.step)
        if self.readings and self.readings[-1].step == reading.step:
            reading = self.readings.pop().joined(reading)
        if self.readings and self.readings[-1].units:
            # Of units the newest state counts; kept for every flush they would be the larger part of all memory.
            self.readings[-1] = dataclasses.replace(self.readings[-1], units=NO_UNITS)
        self.readings.append(reading)
        readings = tuple(self.readings)
        active: dict[_Seen, Finding] = {}
        told: list[Finding] = []
        for diagnostic in tuple(self._diagnostics):
            is_once = diagnostic.__name__ in ONCE
            found = self._ask(diagnostic, readings)
            if isinstance(found, Standing):
                active.update(self._stand(diagnostic.__name__, found, told))
                continue
            for finding in found:
                seen, is_new = self._see(finding, is_once)
                if is_new:
                    told.append(finding)
                elif is_once:  # the first offender is what matters, not who passes it on now
                    finding = next(
                        (old for old in reversed(self._told) if old.diagnostic == finding.diagnostic), finding
                    )
                active[seen] = finding
        if not reading.units:  # units are judged on some readings only; in between, what was found of them stands
            kept = {seen: old for seen, old in self._active.items() if old.diagnostic in _OF_UNITS}
            active = {**kept, **active}
            for seen in kept:
                seen.step = reading.step
        self._active = active
        self._told += told
        return tuple(told)

    def _judged(self, windows: UnitWindows, record: StepRecord | None, is_flush: bool) -> Mapping[str, UnitStatus]:
        """The state of units after a record, where it is asked for; units are left alone once that has failed."""
        try:
            if record is not None:
                windows.add(record)
            return windows.judge() if is_flush else NO_UNITS
        except Exception as error:
            self._windows = None
            self._error = error
            warn_quietly(f"judging units failed with {type(error).__name__}: {error}; it is left out, training goes on")
            return NO_UNITS

    def _go_back(self, step: int) -> None:
        """Forget everything from a step on: the run was resumed there."""
        while self.readings and self.readings[-1].step > step:
            self.readings.pop()
        self._told = [finding for finding in self._told if finding.step < step]
        known = {(finding.diagnostic, finding.site) for finding in self._told}
        known |= {(finding.diagnostic, None) for finding in self._told if finding.diagnostic in ONCE}
        self._seen = {key: seen for key, seen in self._seen.items() if key in known}
        self._standing.clear()
        for seen in self._seen.values():
            seen.step = min(seen.step, step)

    def _ask(self, diagnostic: Diagnostic, readings: tuple[Reading, ...]) -> Iterable[Finding]:
        try:
            found = diagnostic(readings, self._config)
            return found if isinstance(found, Standing) else list(found)
        except Exception as error:
            self._diagnostics.remove(diagnostic)
            self._error = error
            warn_quietly(
                f"the diagnostic {diagnostic.__name__} raised {type(error).__name__}: {error}; it is switched off, "
                "training goes on"
            )
            return []

    def _stand(self, name: str, found: Standing, told: list[Finding]) -> Mapping[_Seen, Finding]:
        """Remember findings as `_see` does, all by one look where they are those that were found last.

        Args:
            name: Name of the diagnostic.
            found: What it found.
            told: What is new is added here.

        Returns:
            What is active by that.
        """
        known = self._standing.get(name)
        cooldown = self._config.finding_cooldown
        if known is None or known.undated is not found.undated or found.step - known.step > cooldown:
            known = self._standing[name] = _Standing(found.undated)
            for undated in found.undated:
                seen, is_new = self._see(finding := undated.on(found.step), is_once=False)
                known.active[seen] = undated
                if is_new:
                    told.append(finding)
        known.step = found.step
        for seen in known.active:
            seen.step = found.step
        return known.active

    def _see(self, finding: Finding, is_once: bool) -> tuple[_Seen, bool]:
        """Remember a finding; and whether it is to be told: never before, or worse, or back after the cooldown."""
        key = finding.diagnostic, None if is_once else finding.site
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(finding)
            return seen, True
        is_new = finding.level > seen.level or finding.step - seen.step > self._config.finding_cooldown
        if is_new:
            seen.level = finding.level
        seen.step = finding.step
        return seen, is_new


_OF_UNITS = frozenset({"dead_units", "saturated_units"})


def _longest(config: Config) -> int:
    """Readings that are kept: as many as any diagnostic looks back, and as the history has."""
    return max(
        config.history,
        config.spike_window + 1,
        config.update_ratio_checks,
        config.depth_checks,
        config.unused_checks,
        config.unchanged_checks,
    )
