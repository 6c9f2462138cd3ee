"""`watch()`, `unwatch()`, and the `Watcher` that the one returns and the other closes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from instrument.capture.names import Site, check_selection
from instrument.capture.patterns import Patterns
from instrument.config import Config, ConfigSource
from instrument.diagnose.report import Report
from instrument.errors import RunError, warn_quietly
from instrument.record.buffer import StepRecord
from instrument.record.runs import make_run_directory
from instrument.record.writer import RecordSink, SummaryWriter, sink_for
from instrument.watcher.arguments import (
    EVERYTHING,
    FIRST,
    NOTHING,
    OUTSIDE,
    USUAL_KINDS,
    check_directory,
    check_model,
    check_optimizer,
    check_step,
    settings,
)
from instrument.watcher.session import Session

__all__ = ["Watcher", "unwatch", "watch", "watched_models"]

HEALTH_TAG = "health"


def watch(
    model: nn.Module,
    include: str | Iterable[str] = EVERYTHING,
    exclude: str | Iterable[str] = NOTHING,
    *,
    kinds: str | Iterable[str] = USUAL_KINDS,
    writer: Any = None,
    logdir: str | os.PathLike[str] | None = None,
    config: ConfigSource | None = None,
    interval: int | None = None,
    scalar_interval: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    initial_step: int = 0,
    compiled: str = OUTSIDE,
    ranks: str = FIRST,
    functions: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Watcher:
    """Watch a model while it trains: one line, and nothing in the training changes.

    Steps are told by the optimizers themselves. On sampled steps activations are measured inside forward hooks,
    gradients when an optimizer is about to use them, parameters when it has.

    Args:
        model: The model; wrapped or not, before or after its optimizer is made.
        include: A glob or several over names; `blocks.*` is every block and all it holds.
        exclude: A glob or several over names that are left out.
        kinds: What to watch, of "activations", "activation_gradients", "parameters", "gradients", "updates".
            Parameters are those after the step; updates are what it changed, measured on a strided sample of
            at most 65,536 elements a parameter, whose root mean square is right within 1 %.
        writer: Anything with `SummaryWriter`'s methods, to write through and never to close. Without one, our
            own `SummaryWriter` on `logdir`.
        logdir: Directory of the event files; without it, that of a new run under `runs_directory`.
        config: A path, a mapping or a `Config`; what is given here goes before it.
        interval: Steps between histograms: steps 0, N, 2N ... and the last. 0 or negative: nothing is attached
            and nothing is written.
        scalar_interval: Steps between samples for scalars; at most `interval`.
        optimizer: The one optimizer whose steps count, where they cannot be inferred.
        initial_step: Number of the first step, where a resumed run continues.
        compiled: What to do inside regions of `torch.compile`: "outside", "graph" or "eager".
        ranks: Under `torch.distributed`: "first", "merge" or "each".
        functions: Nonlinearities that are called as functions: glob over module names to function name.
        strict: Whether faults of this library are raised instead of told.

    Returns:
        The watcher; it need not be kept.

    Raises:
        ConfigError: An argument or a configuration that cannot be used.
        SelectionError: An include that matches nothing, or nothing left to watch.

    Example:
        >>> import instrument, torch, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> watcher = instrument.watch(model, include=["0"], logdir=tempfile.mkdtemp())
        >>> [site.name for site in watcher.sites if site.kind == "parameters"]
        ['0.weight', '0.bias']
        >>> watcher.close()
    """
    check_model(model)
    chosen = settings(
        config,
        interval,
        {"include": EVERYTHING, "exclude": NOTHING, "kinds": USUAL_KINDS, "compiled": OUTSIDE, "ranks": FIRST,
         "scalar_interval": None, "functions": None},
        include=include,
        exclude=exclude,
        kinds=kinds,
        compiled=compiled,
        ranks=ranks,
        scalar_interval=scalar_interval,
        functions=functions,
    )  # fmt: skip
    first_step = check_step(initial_step, "initial_step")
    clock = check_optimizer(optimizer)
    if chosen.histogram_interval <= 0:
        _close_earlier(model)
        return Watcher(chosen, writer, off=f"interval is {chosen.histogram_interval}")
    patterns = Patterns(chosen.include, chosen.exclude)
    _, notes = check_selection(model, patterns, chosen.kinds)
    sink = sink_for(writer) if writer is not None else None
    directory = check_directory(logdir)
    _close_earlier(model)
    if sink is None:
        try:
            directory = directory or str(make_run_directory(chosen.runs_directory))
            writer = SummaryWriter(directory, purge_step=first_step)
        except (OSError, RunError) as error:
            warn_quietly(f"{error}; training goes on unwatched")
            return Watcher(chosen, None, off="there is no directory to write to")
        sink = sink_for(writer, is_users=False)
    watcher = Watcher(chosen, writer, sink)
    watcher._begin(model, patterns, clock, first_step, strict, notes)
    return watcher


def unwatch(model: nn.Module) -> None:
    """Close the watch of a model; nothing happens where there is none.

    Args:
        model: The model that was given to `watch`.

    Raises:
        ConfigError: Something else than a module was given.

    Example:
        >>> import instrument, torch
        >>> instrument.unwatch(torch.nn.Linear(1, 1))
    """
    check_model(model)
    watcher = _watchers.get(id(model))
    if watcher is not None and watcher._watches(model):
        watcher.close()


_watchers: dict[int, Watcher] = {}
"""The open watch of each model by identity; nothing is set on the model itself."""


def watched_models() -> list[nn.Module]:
    """The models that have an open watch now."""
    models = [watcher._model() for watcher in list(_watchers.values())]
    return [model for model in models if model is not None]


def _close_earlier(model: nn.Module) -> None:
    earlier = _watchers.get(id(model))
    if earlier is not None and earlier._watches(model):
        warn_quietly("this model is watched already; the earlier watch is closed", stacklevel=3)
        earlier.close()


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
        self._sink = sink
        self._off = off
        self._session: Session | None = None
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
    ) -> None:
        """Open the session; leave nothing behind where that fails."""
        self._key = id(model)
        self._model = weakref.ref(model)
        try:
            self._session = Session(model, self.config, patterns, self._emit, optimizer, initial_step, strict)
            for note in notes:
                self._session.notices.say(note)
            self._session.open()
        except BaseException:
            self.close()
            raise
        _watchers[self._key] = self
        # Runs when the model is collected and when the interpreter exits; keeps the watcher alive until then.
        self._finalizer = weakref.finalize(model, self.close)

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
        """The last step records, oldest first."""
        if self._session is None:
            return ()
        self._settle()
        return tuple(self._session.buffer.history)

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

    def report(self) -> Report:
        """The last value of each statistic, and what could not be observed; print it for tables."""
        return Report.of_records(self.history, self.notices)

    def flush(self) -> None:
        """Write what was buffered; it is on disk when this returns."""
        if self._sink is not None and not self._is_closed:
            self._settle()
            self._sink.flush()

    def close(self) -> None:
        """Log the last step, write everything, and take every hook off; does nothing the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._finalizer is not None:
            self._finalizer.detach()
        if _watchers.get(getattr(self, "_key", 0)) is self:
            del _watchers[self._key]
        session, sink = self._session, self._sink
        try:
            if session is not None:
                session.close()
        finally:
            if sink is not None:
                if session is not None and session.buffer.history and not session.is_elsewhere():
                    report = Report.of_records(session.buffer.history, session.notices.texts)
                    sink.text(HEALTH_TAG, report.markdown, session.buffer.history[-1].step)
                sink.close()

    def _settle(self) -> None:
        if self._session is not None and not self._is_closed:
            self._session.settle()

    def _emit(self, record: StepRecord, scalars: bool, histograms: bool) -> None:
        if self._sink is not None:
            self._sink.write(record, scalars, histograms)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._off:
            return f"Watcher(off: {self._off})"
        state = "closed" if self._is_closed else f"step {self._session.clock.step if self._session else 0}"
        return f"Watcher({state}, {len(self.sites)} sites, logdir={self.logdir!r})"


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
