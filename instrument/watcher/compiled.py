"""What to do inside regions of `torch.compile`, where the default is to leave them alone.

``compiled="eager"``: sampled steps run uncompiled, by the stance ``force_eager``, and all hooks work as ever. The
stance is set around each call of the root; where the root itself is called from a compiled function, from the end of
the step before to the end of the sampled one.

``compiled="graph"``: hooks stand on the modules for good and call the operator ``instrument::measure`` under a Python
bool, so that two graphs are compiled, one with the operator and one without. They must be there before the first
call. Accumulators are attributes that Dynamo itself has made while it traces; a dictionary would be seen as it was when
it was read first.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from instrument.capture.hooks import InertHook
from instrument.capture.names import ModuleEntry, Site
from instrument.measure.device import RowSketch
from instrument.measure.sketch import CODES, Sketch, empty_moments
from instrument.torch_private import (
    called_from_compiled_function,
    in_backward,
    in_compiled_call,
    never_compile_code,
    run_while_tracing,
    when_call_ends,
)

__all__ = ["EagerStance", "GraphTaps"]


class EagerStance:
    """Runs everything uncompiled while it is on, and puts the stance back that was there before."""

    def __init__(self) -> None:
        self._stance: contextlib.AbstractContextManager[Any] | None = None
        self._ends_with_root = False
        self._calls = 0
        self._thread = 0
        self.was_cut_short = False
        """Whether an exception ended it, so that what comes after runs compiled until it starts again."""

    def start(self) -> None:
        """Run uncompiled from now on; nothing happens where that is so, or inside a compiled call."""
        self._calls += 1
        if self._stance is None and not in_compiled_call():
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
            self._thread = threading.get_ident()
            self.was_cut_short = False

    def stop(self) -> None:
        """Put back what was there before."""
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)

    def root_starts(self) -> None:
        """The root is called to train in a sampled step."""
        self._ends_with_root = not called_from_compiled_function()
        was_cut_short = self.was_cut_short
        self.start()
        # What is being called from a compiled function goes on as it began.
        self.was_cut_short = was_cut_short and not self._ends_with_root
        number = self._calls
        when_call_ends(lambda: self._root_is_left(number))

    def _root_is_left(self, number: int) -> None:
        """The frame of a call of the root is gone: an exception that torch tells no hook of has left it, if none ended.

        The last that held its traceback may have been another thread, which has a stance of its own to run by.
        """
        if number == self._calls and self._thread == threading.get_ident():
            self.root_ends(has_failed=True)

    def root_ends(self, has_failed: bool) -> None:
        """The root has returned, or an exception left it.

        An evaluation leaves the stance on: the training pass is yet to come, and a compiled function that sees the
        stance end while it runs takes itself for one that was never compiled, an error with ``fullgraph=True``.
        """
        self._calls += 1
        if has_failed or self._ends_with_root:
            self._ends_with_root = False
            self.stop()
            self.was_cut_short = self.was_cut_short or has_failed


_keys = itertools.count()
_taps: weakref.WeakValueDictionary[int, _GraphTap] = weakref.WeakValueDictionary()

ACTIVATION, GRADIENT = 1, 2


@run_while_tracing
def _reserve(key: int, path: str) -> int:
    """Make the accumulators of one output; called by Dynamo itself where a graph is traced.

    Returns:
        What is wanted of this output: `ACTIVATION`, `GRADIENT`, both or neither.
    """
    return _taps[key].reserve(path)


class _GraphTap(InertHook):
    """Forward hook of one module; a graph takes it in whole.

    Blocks that are compiled one by one share a graph, which is guarded by every number and name that it was traced
    with: a key that differs from block to block would compile each anew, until Dynamo's limit ends the training. So
    what a lone tensor needs is made at once, and the key is looked at for other outputs only.
    """

    def __init__(self, switch: GraphTaps, name: str) -> None:
        self.key = next(_keys)
        self.switch = switch
        self.name = name
        self.wanted: dict[str, int] = {}
        self.was_called = False
        """Whether anything was measured."""
        _taps[self.key] = self
        self.wanted_alone = self.reserve("")

    def reserve(self, path: str) -> int:
        """Make the accumulators of one output where that was not done."""
        if path not in self.wanted:
            name = self.name + path
            wants = self.switch.wants
            self.wanted[path] = ACTIVATION * wants(Site("activations", name)) + GRADIENT * wants(
                Site("activation_gradients", name)
            )
            for kind in ("activations", "activation_gradients"):
                device = self.switch.device
                setattr(self, f"codes:{kind}{path}", torch.zeros(CODES, dtype=torch.int64, device=device))
                setattr(self, f"moments:{kind}{path}", torch.from_numpy(empty_moments()).to(device))
        return self.wanted[path]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called by torch when the module has returned, and traced by Dynamo."""
        is_recomputed = not torch.compiler.is_compiling() and in_backward()
        # A part that is frozen in evaluation mode trains with the model around it.
        root = self.switch.root()
        is_training = module.training if root is None else root.training
        # The switch comes last: a graph for evaluation that had looked at it would be compiled twice.
        if is_training and torch.is_grad_enabled() and not is_recomputed and self.switch.is_on:
            self._visit("", output)

    def _visit(self, path: str, output: Any) -> None:
        # A walker of its own: Dynamo traces plain tests and loops, not the generator for all kinds of outputs.
        if isinstance(output, torch.Tensor):
            wanted = self.wanted_alone if path == "" else _reserve(self.key, path)
            if wanted & ACTIVATION:
                codes, moments = getattr(self, f"codes:activations{path}"), getattr(self, f"moments:activations{path}")
                torch.ops.instrument.measure(output.detach(), codes, moments)
            if wanted & GRADIENT and output.requires_grad:
                grad_codes = getattr(self, f"codes:activation_gradients{path}")
                grad_moments = getattr(self, f"moments:activation_gradients{path}")

                def measure_gradient(gradient: torch.Tensor) -> None:
                    torch.ops.instrument.measure(gradient, grad_codes, grad_moments)

                output.register_hook(measure_gradient)
        elif isinstance(output, (tuple, list)):
            for index, part in enumerate(output):
                self._visit(f"{path}[{index}]", part)
        elif isinstance(output, dict):
            for key, part in output.items():
                self._visit(f"{path}[{key}]", part)

    def take(self) -> Iterator[tuple[Site, Sketch | RowSketch | None]]:
        """What was accumulated since the last call; None for what could not be measured.

        What lies on a GPU is not looked at, so that a module that was not called has a sketch of nothing.
        """
        for path in self.wanted:
            for kind in ("activations", "activation_gradients"):
                codes, moments = getattr(self, f"codes:{kind}{path}"), getattr(self, f"moments:{kind}{path}")
                if not codes.is_cpu:
                    self.was_called = True
                    yield Site(kind, self.name + path), RowSketch(codes, moments)
                    continue
                counts, found = codes.numpy(), moments.numpy()
                if found[0] or counts.any():
                    self.was_called = True
                    site = Site(kind, self.name + path)
                    yield site, None if np.isnan(found[0]) else Sketch.from_dense(counts, found.tolist())
                    counts.fill(0)
                    found[:] = empty_moments()


class GraphTaps:
    """The hooks that stay on for `compiled="graph"`, and the switch that all graphs look at.

    Args:
        model: The root, whose mode says whether a call of any of its parts trains; only a weak reference is kept.
        entries: The selected modules.
        wants: Whether a site is watched.
    """

    def __init__(self, model: nn.Module, entries: Iterable[ModuleEntry], wants: Callable[[Site], bool]) -> None:
        first = next(model.parameters(), None)
        self.device = first.device if first is not None and first.device.type == "cuda" else torch.device("cpu")
        """Where accumulators lie: with the model on a GPU, where nothing waits for them."""
        never_compile_code(_GraphTap.__call__.__code__)  # where it runs outside of a graph; within one it is inlined
        self.is_on = False
        """Whether this step is sampled."""
        self.wants = wants
        self.root = weakref.ref(model)
        self._taps: list[_GraphTap] = []
        self._handles: list[RemovableHandle] = []
        for entry in entries:
            tap = _GraphTap(self, entry.name)
            self._taps.append(tap)
            self._handles.append(entry.module.register_forward_hook(tap))

    def collect(self) -> Iterator[tuple[Site, Sketch | RowSketch | None]]:
        """What was measured since the last call; None for what could not be."""
        for tap in self._taps:
            yield from tap.take()

    def called(self) -> set[str]:
        """Names of the modules that a graph, or a call outside of any, has measured."""
        return {tap.name for tap in self._taps if tap.was_called}

    def close(self) -> None:
        """Take the hooks off."""
        self.is_on = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
