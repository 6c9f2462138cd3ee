"""The clock: which optimizer step is going on, told by the optimizers themselves.

Forward passes count wrongly in most ordinary loops (accumulation, evaluation, several networks), so the clock
is one process-wide pair of hooks that every `torch.optim.Optimizer` calls. What shaped the counting:

* an optimizer counts where it holds a parameter of the model, by identity; others in the process do not;
* a subclass that calls ``super().step()`` fires the hooks twice: only its outermost call counts;
* several optimizers make one step together (GAN, Muon beside AdamW, one optimizer a parameter in backward):
  the step is the largest count of any, and one that lags behind catches up; where a gradient scaler has skipped the
  step of one of them, those that step after the same forward pass are level again;
* an optimizer made anew for the parameters of an earlier one goes on where that one stood;
* a foreign optimizer that holds copies of the weights (apex, Megatron) is adopted when it has stepped twice and
  no other has;
* without any optimizer a step is seen at the next forward pass, by the version counter of the parameters;
* `step()` by hand ends all inference.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from instrument.torch_private import calling_scale, never_compile, runs_within_another_step, version_of

__all__ = ["StepClock", "StepListener"]

Optimizer: TypeAlias = torch.optim.Optimizer

PATIENCE = 16
"""Steps after which an optimizer that no longer steps is no longer waited for."""


class StepListener(Protocol):
    """Who is told when an optimizer that counts starts and ends a step."""

    def step_starts(self, optimizer: Optimizer, index: int, closure: bool) -> None:
        """An optimizer is about to make step `index`; its gradients are ready unless it got a closure."""

    def step_ends(self, optimizer: Optimizer, index: int, closure: bool) -> None:
        """An optimizer has made step `index`."""


class _Owner:
    """What the clock knows of one optimizer."""

    __slots__ = ("count", "depth", "identities", "index", "is_quiet", "ref", "relevant", "sightings", "signature")

    def __init__(self, optimizer: Optimizer) -> None:
        self.ref = weakref.ref(optimizer)
        self.signature: tuple[int, int, int] | None = None
        self.relevant = False
        self.identities: frozenset[int] = frozenset()
        self.count: int | None = None
        self.index = 0
        self.depth = 0
        self.is_quiet = False
        self.sightings = 0


class StepClock:
    """Counts the optimizer steps of one model.

    Args:
        parameters: Gives the model's parameters as they are now.
        listener: Told of steps that start and end; it must not raise.
        initial_step: Number of the first step.
        optimizer: Where given, this optimizer alone counts.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[torch.Tensor]],
        listener: StepListener,
        initial_step: int = 0,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.step = initial_step
        """Steps finished so far, counted from 0; the number of the step that goes on now."""
        self.quiet_until = initial_step
        """Steps below this number need nobody to be told; set by the listener, for steps that are not sampled."""
        self.manual = False
        """Whether steps are ended by hand, so that nothing is inferred."""
        self._initial_step = initial_step
        self._parameters = parameters
        self._listener = listener
        self._only = weakref.ref(optimizer) if optimizer is not None else None
        self._thread = threading.get_ident()
        self._owners: dict[int, _Owner] = {}
        self._identities: frozenset[int] = frozenset()
        self._has_owner = False
        self.has_adopted = False
        """Whether the clock is a foreign optimizer, which holds none of the model's own parameters."""
        self._version: int | None = None
        self._since_pass: list[_Owner] | None = None
        """Who has stepped since the last training forward pass; None where passes are not seen."""

    def start(self) -> None:
        """Begin to listen to optimizers."""
        _listen(self)

    def stop(self) -> None:
        """Listen no more; does nothing where the clock does not listen."""
        _ignore(self)

    @property
    def has_optimizer(self) -> bool:
        """Whether there is an optimizer that counts: one that was given, or was seen to step."""
        return self._only is not None or self._has_owner or self.has_adopted

    @property
    def is_stepping(self) -> bool:
        """Whether an optimizer's `step` is running, so that a forward pass belongs to its closure."""
        return any(owner.depth > 0 for owner in self._owners.values() if owner.relevant)

    def due(self) -> tuple[int, ...]:
        """Numbers of the steps that the next optimizer to step may make: this one, and one that others made.

        Parameters that change before any optimizer has stepped may be the first climb of SAM, and no step.
        """
        is_guess = self.step == self._initial_step + 1 and not (self.has_optimizer or self.manual)
        return (self.step - 1, self.step) if is_guess or self._is_lagging() else (self.step,)

    def _is_lagging(self) -> bool:
        """Whether an optimizer has yet to make the step that another has made."""
        return any(
            owner.relevant and owner.count is not None and self.step - PATIENCE <= owner.count < self.step
            for owner in self._owners.values()
            if owner.ref() is not None
        )

    def advance(self, step: int | None = None) -> int:
        """End a step by hand; from now on nothing is inferred.

        The first call may come after an optimizer of this step was seen: then the step was counted already.

        Args:
            step: Number of the step that ends, where the loop has numbers of its own; one below the steps
                that ended before counts as the next one.

        Returns:
            Number of the step that ended.
        """
        counted = not self.manual and self.step > self._initial_step
        ending = self.step - 1 if counted else self.step
        self.manual = True
        self.step = (ending if step is None else max(step, ending)) + 1
        return self.step - 1

    def forward_starts(self) -> bool:
        """Look, before a training forward pass, whether a step was made without any optimizer.

        Returns:
            Whether one was; it is counted then.
        """
        self._since_pass = []
        if self.manual or self.has_optimizer or self.is_stepping:
            return False
        known = (version_of(parameter) for parameter in self._parameters() if parameter.requires_grad)
        versions = [version for version in known if version is not None]
        if not versions:  # nothing to train, the model is gone, or this torch does not tell
            return False
        version = sum(versions)
        moved = self._version is not None and version != self._version
        self._version = version
        if moved:
            self.step += 1
        return moved

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: an optimizer anywhere in the process begins a step."""
        owner = self._owners.get(id(optimizer))
        quiet = owner is not None and owner.relevant and not owner.depth and self.step < self.quiet_until
        if quiet and owner is not None and owner.ref() is optimizer:
            owner.depth = 1
            owner.is_quiet = True
            self._since_pass = None
            return
        owner = self._owner(optimizer)
        if not owner.relevant:
            return
        if owner.depth and runs_within_another_step():
            owner.depth += 1
            return
        owner.depth = 1
        owner.is_quiet = False
        owner.index = self._index(owner)
        self._listener.step_starts(optimizer, owner.index, _closure(args, kwargs))

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: an optimizer anywhere in the process has ended a step."""
        owner = self._owners.get(id(optimizer))
        if owner is None or owner.ref() is not optimizer:
            return
        if not owner.relevant:
            self._consider_adopting(owner)
            return
        if owner.depth == 0:
            return
        owner.depth -= 1
        if owner.depth:
            return
        if owner.is_quiet:
            if not self.manual:
                owner.count = self._index(owner) + 1
                if owner.count > self.step:
                    self.step = owner.count
            return
        owner.count = owner.index + 1
        if not self.manual:
            self.step = max(self.step, owner.count)
            self._level(owner, owner.count)
        self._listener.step_ends(optimizer, owner.index, _closure(args, kwargs))

    def _level(self, newest: _Owner, count: int) -> None:
        """An optimizer whose steps a scaler had skipped made this one too, if no pass lies between them."""
        if self._since_pass is None or calling_scale() is None:
            return
        if newest in self._since_pass:  # a pass was not seen, as on steps that are not sampled
            self._since_pass = None
            return
        for other in self._since_pass:
            other.count = max(other.count or 0, count)
        self._since_pass.append(newest)

    def _owner(self, optimizer: Optimizer) -> _Owner:
        """What is known of this optimizer, with its parameters looked at again where they changed."""
        owner = self._owners.get(id(optimizer))
        if owner is None or owner.ref() is not optimizer:
            owner = _Owner(optimizer)
        groups = optimizer.param_groups
        last = groups[-1]["params"] if groups else ()
        signature = (
            len(groups[0]["params"]) if len(groups) == 1 else sum(len(group["params"]) for group in groups),
            id(last[0]) if last else 0,
            id(last[-1]) if last else 0,
        )
        if signature != owner.signature:
            owner.signature = signature
            owner.identities = frozenset(id(p) for group in groups for p in group["params"])
            owner.relevant = self._is_relevant(optimizer, owner)
            if owner.relevant and owner.count is None and self._replaces(owner):
                owner.count = self.step
            self._owners[id(optimizer)] = owner
        return owner

    def _is_relevant(self, optimizer: Optimizer, owner: _Owner) -> bool:
        if self._only is not None:
            return self._only() is optimizer
        if owner.identities.isdisjoint(self._identities):
            self._identities = frozenset(id(p) for p in self._parameters())
            if owner.identities.isdisjoint(self._identities):
                return False
        if not self._has_owner:
            self._has_owner = True
            self._drop_adopted()
        return True

    def _replaces(self, new: _Owner) -> bool:
        """Whether a new optimizer was made in place of one that has made the newest step already."""
        done = [o for o in self._owners.values() if o is not new and o.relevant and o.count == self.step]
        replaced = [o for o in done if o.ref() is None or o.identities <= new.identities]
        for key, old in list(self._owners.items()):
            if old.ref() is None:
                del self._owners[key]
        return bool(replaced) and self.step > self._initial_step

    def _index(self, owner: _Owner) -> int:
        """Number of the step that this optimizer makes now."""
        if self.manual:
            return self.step
        return max(self._initial_step, self.step - 1, owner.count or 0)

    def _consider_adopting(self, owner: _Owner) -> None:
        """Take a foreign optimizer for the clock where it steps again and again and no owner was ever seen."""
        if self._has_owner or self._only is not None or not any(p.grad is not None for p in self._parameters()):
            return
        if threading.get_ident() != self._thread:  # another training of the same process
            return
        owner.sightings += 1
        if owner.sightings == 2:
            owner.relevant = self.has_adopted = True
            owner.count = self.step = max(self.step, self._initial_step + 2)

    def _drop_adopted(self) -> None:
        """Forget foreign optimizers: one that holds the model's own parameters has turned up."""
        if self.has_adopted:
            self.has_adopted = False
            for owner in self._owners.values():
                owner.relevant = False


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `step` was given a closure; the first of `args` is the optimizer itself."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


# One pair of hooks serves all clocks. Hooks are neither added nor removed while one of them runs: torch iterates
# over its dictionary of hooks meanwhile, in whatever thread, and a change there raises in the user's `step()`.

_lock = threading.RLock()
_clocks: tuple[StepClock, ...] = ()
_handles: list[RemovableHandle] = []
_running: list[None] = []
"""One entry a hook that runs now, in any thread; appending and popping are atomic."""


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _running.append(None)
    try:
        for clock in _clocks:
            clock.before(optimizer, args, kwargs)
    finally:
        _running.pop()


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _running.append(None)
    try:
        for clock in _clocks:
            clock.after(optimizer, args, kwargs)
    finally:
        _running.pop()


def _listen(clock: StepClock) -> None:
    global _clocks
    with _lock:
        if clock not in _clocks:
            _clocks = (*_clocks, clock)
        if not _handles:
            # A compiled `step` must call the hooks, not trace them: their counters would recompile it each step.
            _handles.append(register_optimizer_step_pre_hook(never_compile(_before)))
            _handles.append(register_optimizer_step_post_hook(never_compile(_after)))


def _ignore(clock: StepClock) -> None:
    global _clocks
    with _lock:
        _clocks = tuple(other for other in _clocks if other is not clock)
        if not _clocks and not _running:
            for handle in _handles:
                handle.remove()
            _handles.clear()
