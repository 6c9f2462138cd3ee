"""The life of a step: what is measured when, and when it is over.

An optimizer's hooks say when a step starts and ends; on a sampled step the root's hook attaches taps to the
selected modules; what they and the parameters yield is measured at once, buffered, and handed on as a record when
the step is over. That is when the next one starts, since only then is it certain that no second optimizer has yet
to make its part of it.

Everything that runs inside a hook is guarded: a fault is told once, that site is switched off, training goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from instrument.capture.hooks import Taps
from instrument.capture.names import ModuleEntry
from instrument.capture.parameters import Pairs
from instrument.capture.patterns import Patterns
from instrument.capture.steps import StepClock
from instrument.config import Config
from instrument.measure.pending import ALONE
from instrument.record.buffer import StepRecord
from instrument.record.turns import TURNS
from instrument.torch_private import calling_scale
from instrument.watcher.budget import Budget, Meter, MeteredSteps, MeteredTaps
from instrument.watcher.collector import Collector
from instrument.watcher.compiled import EagerStance, GraphTaps
from instrument.watcher.notices import Notices
from instrument.watcher.schedule import Schedule

__all__ = ["Session"]

PATIENCE = 3
"""Backward passes whose gradients vanish without a step being seen, before that is said."""


class Session:
    """Watches one model, and hands on a record of each sampled step.

    Args:
        model: The model; only a weak reference is kept.
        config: The settings.
        patterns: What is included and excluded.
        emit: Takes each record, and whether its scalars and its histograms are to be written.
        optimizer: Where given, this optimizer alone is the clock.
        initial_step: Number of the first step.
        strict: Whether faults of ours are raised.
        written: Gives the seconds of the processor that writing has taken so far, for the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        patterns: Patterns,
        emit: Callable[[StepRecord, bool, bool], None],
        optimizer: Optimizer | None,
        initial_step: int,
        strict: bool,
        written: Callable[[], float] = float,
    ) -> None:
        self.notices = Notices(strict)
        """What could not be observed, and why."""
        self.collector = Collector(model, config, patterns, self.notices)
        self.buffer = self.collector.buffer
        # What hooks call for each module goes to the collector without a detour.
        self.wants, self.take, self.judge = self.collector.wants, self.collector.take, self.collector.judge
        self.wants_kind = self.collector.wants_kind
        self._pid = os.getpid()
        self.schedule = Schedule(config.histogram_interval, config.scalar_interval)
        """Which steps are sampled."""
        meter = Meter() if config.budget else None
        self._budget = Budget(config.budget, self.schedule.scalar_interval, meter, written) if meter else None
        self._drawn: int | None = None
        self._is_guess, self._emit = False, emit
        self._initial_step = initial_step
        self._running: set[int] = set()
        self._silent_backwards = 0
        self._are_calls_checked = False
        self._inside_graph: dict[str, None] = {}
        listener = MeteredSteps(meter, self) if meter else self
        self.clock = StepClock(self.collector.every_parameter, listener, initial_step, optimizer)
        self._stance = EagerStance() if config.compiled == "eager" else None
        always_tell = self._stance is not None
        self.taps = MeteredTaps(meter, model, self, always_tell) if meter else Taps(model, self, always_tell)
        self._graph_taps: GraphTaps | None = None
        if config.compiled == "graph":
            self._graph_taps = GraphTaps(model, self.collector.selected(), self.collector.wants)

    def open(self) -> None:
        """Begin to watch."""
        self.clock.start()
        self._prepare()

    def forward_starts(self, training: bool) -> bool:
        """The root is called; returns whether modules are to be captured in this pass."""
        if self.is_elsewhere():
            return False
        TURNS.begin()
        try:
            self.collector.units.pass_starts()
            if training:
                self._look_for_a_silent_step()
                self._look_for_a_skipped_step()
            if not self.clock.is_stepping:
                self.settle(lenient=False)
            is_sampled = any(self.schedule.is_sampled(step) for step in self.clock.due())
            if is_sampled and self.collector.sees_capturing():
                return False
            if self._stance is not None and is_sampled and training:
                self._stance.root_starts()
        except Exception as error:
            self.failed("the model's forward", error)
            return False
        return is_sampled

    def forward_ends(self, has_failed: bool) -> None:
        """The root has returned, or an exception has left it."""
        TURNS.end()
        if self._stance is not None:
            self._stance.root_ends(has_failed)

    def backward_starts(self) -> None:
        """Gradients flow back: where no optimizer will say when all are there, their end does."""
        if not self.clock.has_optimizer and self.schedule.is_sampled(self.clock.step):
            self.collector.await_gradients(self.clock.step)

    def sees_through_graphs(self) -> bool:
        """Whether sampled steps run uncompiled."""
        return self._stance is not None

    def modules(self) -> Iterable[ModuleEntry]:
        """The modules to attach to, as the model is now."""
        return self.collector.modules()

    def encoder_layers(self) -> Iterable[nn.TransformerEncoderLayer]:
        """The transformer encoder layers in the model, as it was when its modules were last asked for."""
        return self.collector.encoder_layers()

    def inside_graph(self, names: Iterable[str]) -> None:
        """Modules that are part of a compiled graph and so are not observed."""
        self._inside_graph.update(dict.fromkeys(names))

    def failed(self, place: str, error: Exception) -> None:
        """Tell of a fault of ours; raise it in strict mode."""
        self.notices.failed(place, error)

    # What the clock tells.

    def step_starts(self, optimizer: Optimizer, index: int, closure: bool) -> None:
        """An optimizer is about to make a step: its gradients are ready, unless it got a closure."""
        if self.is_elsewhere():
            return
        try:
            if self.buffer.step is not None and self.buffer.step < index:
                self._close_record()
            if not self.schedule.is_sampled(index) or index < (self.buffer.step or 0):
                self._passes(index)  # what another optimizer's step had captured is of no use to this one
                return
            if id(optimizer) in self._running:  # its last step raised before it ended
                self._drop_record()
                if closure:
                    self._passes(index)  # those that its closure made
            self.collector.open(index)
            pairs = self._pairs_of(optimizer)
            # A wrapper's step is running, and the gradients that count are those used inside; or what was taken for a
            # step without an optimizer was the first climb of SAM.
            if self._running or self._is_guess:
                self.collector.forget(pairs)
            self._is_guess = False
            self._running.add(id(optimizer))
            if self.collector.wants_kind("updates"):
                self.collector.remember(pairs)
            if not closure:
                self._take_passes()
                self.collector.add_gradients(pairs, getattr(optimizer, "grad_scale", None))
                if self.taps.backwards:
                    self.collector.look_for_hidden_gradients(pairs)
        except Exception as error:
            self.failed("the optimizer's step", error)

    def step_ends(self, optimizer: Optimizer, index: int, closure: bool) -> None:
        """An optimizer has made a step: its parameters have their new values."""
        if self.is_elsewhere():
            return
        try:
            self._silent_backwards = 0
            if self.buffer.step == index and id(optimizer) in self._running:
                self._running.discard(id(optimizer))
                pairs = self._pairs_of(optimizer)
                if closure:
                    self._take_passes()
                    # A wrapper's step with a closure may have stepped another optimizer: those gradients are there.
                    self.collector.add_missing(self.collector.parameters.gradients(pairs))
                found_inf = getattr(optimizer, "found_inf", None)
                if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
                    self.buffer.skipped = True
                if not self._running and not self.clock.has_adopted:
                    if self.collector.wants_kind("updates"):
                        self.collector.add_updates(pairs)
                    self.collector.add(self.collector.parameters.values(pairs))
            self.taps.step_ended()
            self._prepare()
        except Exception as error:
            self.failed("the optimizer's step", error)

    def _pairs_of(self, optimizer: Optimizer) -> Pairs:
        """The parameters that an optimizer is about; a foreign one holds copies of all."""
        return self.collector.parameters.of(None if self.clock.has_adopted else optimizer)

    def expect_calls_of_parts(self) -> None:
        """The step that begins may call the model's modules and never the model: attach without waiting for it."""
        if self.is_elsewhere() or self._graph_taps is not None or self.taps.root_called:
            return
        if any(self.schedule.is_sampled(step) for step in self.clock.due()):
            self.taps.attach()

    def end_by_hand(self, step: int | None) -> None:
        """End a step by hand."""
        expected, inferred = self.clock.step, self.clock.step > self._initial_step and not self.clock.manual
        if step is not None and step < expected - inferred:
            self.notices.say(f"step({step}) was called after step {expected - 1 - inferred}: counted on from there")
        ended = self.clock.advance(step)
        if not inferred and (self.schedule.is_sampled(expected) or self.buffer.step is not None):
            self.collector.open(expected)
            self._take_passes()
            self.collector.add_what_is_there(expected)
        if self.buffer.step is not None:
            self.buffer.step = ended
        self.settle()
        self.taps.step_ended()
        self._prepare()

    def settle(self, lenient: bool = True) -> None:
        """Close the record of a step that is over.

        Args:
            lenient: Whether a step counts as over although an optimizer may yet make its part of it.
        """
        if lenient and self.clock.forward_starts():
            self._take_silent_step()
        step = self.buffer.step
        if step is not None and step < self.clock.step and (lenient or step not in self.clock.due()):
            self._close_record()

    def close(self) -> None:
        """Log the last step where that was not done, and take every hook off."""
        try:
            if not self.is_elsewhere():
                self.settle()
                self._log_last_step()
        except Exception as error:
            self.failed("the last step", error)
        finally:
            self.clock.stop()
            self.taps.close()
            if self._stance is not None:
                self._stance.stop()
            if self._graph_taps is not None:
                self._graph_taps.close()
            self.collector.parameters.select(())

    def _log_last_step(self) -> None:
        last = self.clock.step - 1
        if last < self._initial_step:
            return
        newest = self.buffer.history[-1] if self.buffer.history else None
        if newest is None or newest.step < last:
            self.collector.open(last)
            self.collector.add_what_is_there(last)
            record = self.collector.close()
            if record is not None:
                self._emit(record, True, True)
        elif self._drawn != last:
            self._emit(newest, False, True)

    def _look_for_a_silent_step(self) -> None:
        """Before a training pass: was a step made without any optimizer, or are gradients gone without one?"""
        if self.clock.forward_starts():
            self._take_silent_step()
        elif not self.clock.has_optimizer and not self.clock.manual and self.taps.backwards:
            if self.collector.are_gradients_gone():
                self._silent_backwards += 1
                self.taps.backwards = 0
            if self._silent_backwards == PATIENCE:
                self.notices.no_step(PATIENCE)

    def _take_silent_step(self) -> None:
        """A step without an optimizer was made: take what it left behind."""
        self._silent_backwards = 0
        ended = self.clock.step - 1
        if self.buffer.step is not None and self.buffer.step < ended:
            self._close_record()
        if self.schedule.is_sampled(ended):
            self.collector.open(ended)
            self._take_passes()
            self.collector.add_what_is_there(ended)
            self._is_guess = ended in self.clock.due()
            if not self._is_guess:
                self._close_record()
        else:
            self._passes(ended)  # of no use to a later step
        self.taps.step_ended()
        self._prepare()

    def _look_for_a_skipped_step(self) -> None:
        """Before a training pass: were gradients thrown away that no step has used?"""
        if not self.taps.backwards or not self.clock.has_optimizer or self.clock.is_stepping:
            return
        if all(parameter.grad is None for parameter in self.collector.every_parameter()):
            self.taps.gradients_were_dropped()

    # The record of a step.

    def ask_for_burst(self, count: int) -> None:
        """Have so many of the next steps sampled, all of them; from any thread.

        Steps that nobody need be told of end at once, so that the burst begins with the step after the next. Where the
        training thread is about to say until when it need not be told, it begins at the next sampled step.
        """
        self.schedule.ask_for_burst(count)
        self.clock.quiet_until = self._initial_step

    def _close_record(self) -> None:
        step = self.buffer.step
        record = self.collector.close()
        self._running.clear()
        if self._stance is not None and self._stance.was_cut_short and self.collector.wants_kind("activations"):
            self.notices.cut_short(step, self.taps.called, record or ())
        self._check_calls()
        if record is not None and step is not None:
            has_histograms = self.schedule.has_histograms(step)
            if has_histograms:
                self._drawn = step
            self._emit(record, True, has_histograms)
            if self._budget is not None:
                self.schedule.stretch(self._budget.factor_after(step))

    def _drop_record(self) -> None:
        self.buffer.drop()
        self._running.clear()

    def _passes(self, step: int) -> list[Any]:
        """What was captured for a step since the last call, as for `Collector.add_measured`."""
        inside = self._graph_taps.collect() if self._graph_taps is not None else ()
        return [*self.taps.collect(step), *(entry for site, found in inside for entry in (site, found, ALONE))]

    def _take_passes(self) -> None:
        assert self.buffer.step is not None
        scale = calling_scale() if self.collector.wants_kind("activation_gradients") else None
        self.collector.add_measured(self._passes(self.buffer.step), scale)

    def _prepare(self) -> None:
        """Make ready for the next step: hooks where it is sampled, none where it is not."""
        self.schedule.begin_burst(self.clock.step)
        if self.buffer.step is None:
            self.clock.quiet_until = self.schedule.next_sampled(self.clock.step) - 1
        is_next_sampled = any(self.schedule.is_sampled(step) for step in self.clock.due())
        if self._graph_taps is not None:
            self._graph_taps.is_on = is_next_sampled
            return
        if self._stance is not None:
            self._stance.start() if is_next_sampled else self._stance.stop()
        if is_next_sampled or not (self.clock.has_optimizer or self.clock.manual):
            self.taps.watch_root()
        else:
            self.taps.leave_root()
        # Attached anew for each step: modules may have come, and hooks of the user's that change an output come first.
        self.taps.detach()
        if is_next_sampled and not self.taps.root_called and self.clock.step > self._initial_step:
            self.taps.attach()  # the root itself is never called: a container, or `model.encode()`

    def _check_calls(self) -> None:
        """After the first sampled step: say what is seen in part, and which selected modules were never called."""
        if self._are_calls_checked or self.collector.has_seen_capturing():
            return
        self._are_calls_checked = True
        self.collector.tell_of_limits()
        if not self.collector.wants_kind("activations"):
            return
        called = self.taps.called if self._graph_taps is None else self._graph_taps.called()
        missing = [name for name in self.collector.watched_modules() if name not in called]
        if self.taps.is_root_traced:
            self.inside_graph(missing)
        self.notices.inside_graph(name for name in missing if name in self._inside_graph)
        self.notices.never_called(name for name in missing if name not in self._inside_graph)

    def is_elsewhere(self) -> bool:
        """Whether this is a process that was forked from the one that watches."""
        return os.getpid() != self._pid
