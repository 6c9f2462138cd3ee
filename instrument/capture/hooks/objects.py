"""The objects that stand in torch's dictionaries of hooks.

* A deep copy or a pickle of the model gets a function of the standard library in their place, which does nothing
  and needs no library to load.
* They hold names and weak references only: a hook that holds its own tensor is never freed, not even by the
  collector.
* Frames of hooks that run outside of a compiled graph would be compiled by themselves, and a test for compilation
  in them would then be folded to true; so Dynamo is told to leave their code and what it calls alone.
* Nothing is ever returned, since a returned value would replace the output.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from instrument.capture.names import Site
from instrument.torch_private import never_compile_code, run_while_tracing

__all__ = [
    "Confirmation",
    "ForwardPass",
    "GradientTap",
    "HookTarget",
    "InertHook",
    "ModuleHook",
    "RootEnds",
    "RootStarts",
    "Tap",
    "keep_hooks_uncompiled",
]


class ForwardPass:
    """What one forward pass yielded so far, with the activation gradients that followed it."""

    __slots__ = (
        "complete", "has_gradient", "in_backward", "is_evaluation", "is_loose", "outputs", "step", "taken", "ungraded",
    )  # fmt: skip

    def __init__(self, in_backward: bool = False, is_evaluation: bool = False) -> None:
        self.is_evaluation = is_evaluation
        """Whether the module was in evaluation mode: it trains where gradients flow back, and there alone."""
        self.in_backward = in_backward
        """Whether the pass is a recomputation whose first pass was not recorded."""
        self.is_loose = False
        """Whether it is the call of one module by itself, outside of any call of the root."""
        self.step: int | None = None
        """The step that first looked at the pass when that was complete."""
        self.complete = False
        """Whether the root's forward ended without an exception."""
        self.has_gradient: bool | None = False
        """Whether gradients flowed back through the root's output; None where its output cannot tell."""
        self.taken: list[Any] = []
        """What was measured, in the order of execution, as the listener keeps it."""
        self.ungraded: set[Site] = set()
        """Outputs that required no gradient: reentrant checkpointing will compute them again with one."""
        self.outputs: list[weakref.ref[Confirmation]] = []
        """The hooks on what the root returned, which live as long as the graph behind it."""

    @property
    def counts(self) -> bool:
        """Whether this is a pass of the training, as far as its output tells."""
        return self.has_gradient is True or (self.has_gradient is None and not self.is_evaluation)

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the graph of this pass is gone and no gradient has come through it."""
        return bool(self.outputs) and not self.has_gradient and all(output() is None for output in self.outputs)


class HookTarget(Protocol):
    """What the hooks report to."""

    def module_called(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A selected module has returned."""

    def root_starts(self, module: nn.Module) -> None:
        """The root is called."""

    def root_ends(self, output: Any) -> None:
        """The root has returned."""

    def gradient_arrived(self, site: Site, gradient: torch.Tensor, forward: ForwardPass) -> None:
        """The gradient of a module's output is there."""

    def backward_starts(self, forward: ForwardPass) -> None:
        """Gradients flow back through the root's output."""


class InertHook:
    """A hook that a copy or a pickle of the model does not carry on."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class ModuleHook(InertHook):
    """A hook of a module, which calls a method of `Taps` without being compiled or traced itself.

    Where a graph takes it in, it does nothing, and remembers that: taken off again, it would cost a recompilation.
    """

    __slots__ = ("_module", "_name", "_taps", "key")

    def __init__(self, taps: HookTarget, name: str, module: nn.Module) -> None:
        self.key = next(_keys)
        self._taps = weakref.ref(taps)
        self._name = name
        self._module = weakref.ref(module)

    @property
    def is_traced(self) -> bool:
        """Whether a graph was compiled with this hook in place."""
        return self.key in _traced

    def is_of(self, module: nn.Module) -> bool:
        """Whether this hook is one of this module."""
        return self._module() is module

    def _live(self, module: nn.Module) -> HookTarget | None:
        """The taps, unless they are gone or the module is a replica that shares the hooks of its original."""
        return self._taps() if self._module() is module else None


_keys = itertools.count()
_traced: set[int] = set()


@run_while_tracing
def _note_tracing(key: int) -> bool:
    """Called by Dynamo itself when it takes a hook into a graph."""
    _traced.add(key)
    return True


class Tap(ModuleHook):
    """Forward hook of one watched module."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called by torch when the module has returned."""
        if torch.compiler.is_compiling():
            _note_tracing(self.key)
        else:
            taps = self._taps()
            if taps is not None and self._module() is module:  # as `_live` says, without a call for each module
                taps.module_called(self._name, module, args, output)


class RootStarts(ModuleHook):
    """Forward pre-hook of the root."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called by torch before the root runs."""
        if torch.compiler.is_compiling():
            _note_tracing(self.key)
        else:
            taps = self._live(module)
            if taps is not None:
                taps.root_starts(module)


class RootEnds(ModuleHook):
    """Forward hook of the root."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called by torch when the module has returned."""
        if torch.compiler.is_compiling():
            _note_tracing(self.key)
        else:
            taps = self._live(module)
            if taps is not None:
                taps.root_ends(output)


class GradientTap:
    """Gradient hook of one output of one watched module."""

    __slots__ = ("_pass", "_site", "_taps")

    def __init__(self, taps: HookTarget, site: Site, forward: ForwardPass) -> None:
        self._taps = weakref.ref(taps)
        self._site = site
        self._pass = forward

    def __call__(self, gradient: torch.Tensor | None) -> None:
        """Called by autograd, with None where the output was not used."""
        taps = self._taps()
        if gradient is not None and taps is not None:
            taps.gradient_arrived(self._site, gradient, self._pass)


class Confirmation:
    """Gradient hook of the root's output: gradients flow back, so the pass is a training pass."""

    __slots__ = ("__weakref__", "_pass", "_taps")

    def __init__(self, taps: HookTarget, forward: ForwardPass) -> None:
        self._taps = weakref.ref(taps)
        self._pass = forward

    def __call__(self, gradient: torch.Tensor | None) -> None:
        """Called by autograd, with None where the output was not used."""
        taps = self._taps()
        if gradient is not None and taps is not None:
            taps.backward_starts(self._pass)


@functools.cache
def keep_hooks_uncompiled() -> None:
    """Frames of hooks that run outside of a graph would be compiled by themselves and then do nothing."""
    for hook in (Tap, RootStarts, RootEnds, GradientTap, Confirmation):
        never_compile_code(hook.__call__.__code__)
