"""The `Watcher` that `watch()` returns: what a user sees of a watch, and how it ends."""

from __future__ import annotations

import os
import sys
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import nn

from instrument.capture.names import Site
from instrument.capture.patterns import Patterns
from instrument.config import Config
from instrument.diagnose.findings import Finding
from instrument.diagnose.report import Report
from instrument.diagnose.units import UnitStatus
from instrument.errors import keep_interrupt
from instrument.record.buffer import StepRecord
from instrument.record.losses import Losses
from instrument.record.ranks.group import RankGroup
from instrument.record.ranks.merging import RecordMerger
from instrument.record.ranks.sink import MergingSink
from instrument.record.writer import RecordSink
from instrument.watcher.arguments import (
    check_step,
)
from instrument.watcher.checkup import Checkup
from instrument.watcher.session import Session

__all__ = ["Watcher", "watchers"]

INTERVAL_TAG = "instrument/interval"
"""Scalar of the steps between samples that a budget has led to."""

watchers: dict[int, Watcher] = {}
"""The open watch of each model by identity; nothing is set on the model itself."""


class Watcher:
    """A watch on one model; made by `watch`, alive until closed or until the model is gone.

    Example:
        >>> import instrument, torch, tempfile
        >>> with instrument.watch(torch.nn.Linear(2, 1), logdir=tempfile.mkdtemp()) as watcher:
        ...     watcher.current_step
        0
    """

    def __init__(self, config: Config, writer: Any, sink: RecordSink | None = None, off: str = "") -> None:
        self.config = config
        """The settings in force."""
        self.writer = writer if writer is not None else _NullWriter()
        """The `SummaryWriter` that is written to; log your own loss to it."""
        self._sink: RecordSink | None = sink
        self._off = off
        self._session: Session | None = None
        self._checkup: Checkup | None = None
        self._finalizer: weakref.finalize[..., nn.Module] | None = None
        self._is_closed = False

    def _begin(
        self,
        model: nn.Module,
        patterns: Patterns,
        optimizer: torch.optim.Optimizer | None,
        initial_step: int,
        strict: bool,
        notes: list[str],
        group: RankGroup | None,
    ) -> None:
        """Open the session; leave nothing behind where that fails."""
        self._key = id(model)
        self._model = weakref.ref(model)
        try:
            session = Session(model, self.config, patterns, self._emit, optimizer, initial_step, strict, self._written)
            self._session = session
            if group is not None:
                merger = RecordMerger(group, session.collector.is_counted)
                self._sink = MergingSink(self._sink, merger, self.config.history, session.notices.say)
            for note in notes:
                self._session.notices.say(note)
            self._checkup = self._begin_checkup(self._session, strict)
            self._session.open()
        except BaseException:
            self.close()
            raise
        watchers[self._key] = self
        # Runs when the model is collected and when the interpreter exits; keeps the watcher alive until then.
        self._finalizer = weakref.finalize(model, self._end)

    def _begin_checkup(self, session: Session, strict: bool) -> Checkup:
        assert self._sink is not None
        losses = getattr(self.writer, "losses", None)
        is_merging = isinstance(self._sink, MergingSink)
        checkup = Checkup(
            self.config,
            self._sink,
            self.logdir,
            losses.at if isinstance(losses, Losses) else _no_loss,
            session.notices,
            # Ranks that merge must all sample the same steps.
            (lambda: None) if is_merging else lambda: session.ask_for_burst(self.config.non_finite_burst),
            strict,
        )
        if isinstance(self._sink, MergingSink):
            self._sink.on_merged = checkup.add
        return checkup

    def _watches(self, model: nn.Module) -> bool:
        return not self._is_closed and self._model() is model

    @property
    def logdir(self) -> str | None:
        """Directory of the event files; None where the writer does not tell, or the watch is off."""
        directory = getattr(self.writer, "log_dir", None) or getattr(self.writer, "logdir", None)
        return os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is watched: (kind, name) pairs."""
        return self._session.collector.sites if self._session is not None else ()

    @property
    def current_step(self) -> int:
        """Steps finished so far, counted from `initial_step`."""
        if self._session is None:
            return 0
        self._settle()
        return self._session.clock.step

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """The last step records, oldest first; with `ranks="merge"` those of all ranks together."""
        self._settle()
        return self._records()

    def _records(self) -> tuple[StepRecord, ...]:
        if isinstance(self._sink, MergingSink):
            return self._sink.records()
        return tuple(self._session.buffer.history) if self._session is not None else ()

    @property
    def notices(self) -> tuple[str, ...]:
        """What could not be observed, and why; each was warned of once."""
        return tuple(self._session.notices.texts) if self._session is not None else ()

    def step(self, step: int | None = None) -> None:
        """End a step by hand; nothing is inferred from then on.

        Args:
            step: Number of the step that ends, where the loop has numbers of its own; without it, the next.

        Raises:
            ConfigError: `step` is no whole number of at least 0.
        """
        number = check_step(step, "step") if step is not None else None
        if self._session is not None and not self._is_closed:
            self._session.end_by_hand(number)

    def _expect_calls_of_parts(self) -> None:
        """For trainers' callbacks: the step that begins may call the model's modules and never the model."""
        if self._session is not None and not self._is_closed:
            self._session.expect_calls_of_parts()

    def findings(self) -> tuple[Finding, ...]:
        """What was found wrong so far, oldest first: level, site, step, value, threshold and a sentence.

        Each is told once; critical ones were also warned of. The list is complete up to the last finished step.
        """
        if self._checkup is None:
            return ()
        self._settle()
        return self._checkup.findings()

    def dead_units(self) -> dict[str, UnitStatus]:
        """The state of the units of each module: which are dead, constant or saturated, and how sure that is."""
        if self._checkup is None:
            return {}
        self._settle()
        return self._checkup.units()

    def report(self) -> Report:
        """The health of each layer, what was found and what could not be observed; print it for tables."""
        return self._checkup.report(self.history) if self._checkup is not None else Report()

    def flush(self) -> None:
        """Write what was buffered; it is on disk when this returns."""
        if self._sink is not None and not self._is_closed:
            self._settle()
            self._sink.flush()
            if self._checkup is not None:
                self._checkup.raise_error()

    def close(self) -> None:
        """Log the last step, write everything, and take every hook off; does nothing the second time."""
        self._close(None)

    def _end(self) -> None:
        """The model is gone, or the interpreter exits: by an exception, if one was the last to be printed."""
        error = getattr(sys, "last_value", None)
        self._close(error if self._model() is not None else None)
        keep_interrupt()

    def _close(self, cause: BaseException | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._finalizer is not None:
            self._finalizer.detach()
        if watchers.get(getattr(self, "_key", 0)) is self:
            del watchers[self._key]
        session, sink = self._session, self._sink
        try:
            if session is not None:
                session.close()
        finally:
            if sink is not None:
                if self._checkup is not None and session is not None and not session.is_elsewhere():
                    self._checkup.close(cause)
                sink.close()
                if self._checkup is not None:
                    self._checkup.raise_error()

    def _settle(self) -> None:
        if self._session is not None and not self._is_closed:
            self._session.settle()

    def _emit(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        if self._sink is not None:
            self._sink.write(record, scalars, histograms)
            if scalars and self._checkup is not None and not isinstance(self._sink, MergingSink):
                self._checkup.add(record, histograms)
            if self.config.budget and self._session is not None:
                self._sink.scalar(INTERVAL_TAG, self._session.schedule.scalar_interval, record.step)

    def _written(self) -> float:
        return self._sink.seconds if self._sink is not None else 0.0

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def __repr__(self) -> str:
        if self._off:
            return f"Watcher(off: {self._off})"
        state = "closed" if self._is_closed else f"step {self._session.clock.step if self._session else 0}"
        every = ""
        if self.config.budget and self._session is not None:
            schedule = self._session.schedule
            every = f"every {schedule.scalar_interval} steps, histograms every {schedule.histogram_interval}, "
        return f"Watcher({state}, {every}{len(self.sites)} sites, logdir={self.logdir!r})"


def _no_loss(step: int, since: int | None) -> float | None:
    """Stands for the losses of a writer that keeps none."""
    return None


class _NullWriter:
    """Takes every call of a `SummaryWriter` and does nothing, for watches that are off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in {"log_dir", "logdir"}:
            return None
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    """Stands for any method of a writer."""
