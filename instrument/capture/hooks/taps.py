"""Hooks: tensors are handed on from inside the forward pass and from gradient hooks, on sampled steps only.

What shaped it (each costs somebody a training run elsewhere):

* tensors are measured inside the hook and never kept: the next in-place operation changes what was kept, and a
  gradient that is kept costs autograd a copy of it;
* gradients of activations come from ``output.register_hook``, which is called with None for outputs that were
  not used; full backward hooks raise with in-place operations and never fire for dictionaries;
* forward hooks are attached by the root's pre-hook on a sampled step and taken off when it ends, so that other
  steps, evaluation, scripting and copying see a model without them;
* what a forward pass yields counts only when gradients flow back through it, and only when it is not the
  recomputation of activation checkpointing.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from instrument.capture.hooks.objects import (
    Confirmation,
    ForwardPass,
    GradientTap,
    ModuleHook,
    RootEnds,
    RootStarts,
    Tap,
    keep_hooks_uncompiled,
)
from instrument.capture.names import ModuleEntry, Site, site_of
from instrument.capture.outputs import named_tensors
from instrument.torch_private import in_backward, in_compiled_call, is_transformed, put_back

__all__ = ["PassListener", "Taps"]

_Attached: TypeAlias = "tuple[ModuleHook, RemovableHandle]"

WAITING_PASSES = 4096
"""Forward passes that may wait for their backward; of more, the oldest are given up."""

LOOK_EVERY = 64
"""Waiting passes after which those are given up whose graph is gone: an evaluation without `no_grad`, in train mode."""


class PassListener(Protocol):
    """Who decides about forward passes and takes the tensors that they yield."""

    def forward_starts(self, training: bool) -> bool:
        """The root is called; returns whether modules are to be captured in this pass."""

    def forward_ends(self, has_failed: bool) -> None:
        """The root has returned, or an exception has left it."""

    def backward_starts(self) -> None:
        """Gradients begin to flow back through what the root returned."""

    def modules(self) -> Iterable[ModuleEntry]:
        """The modules to attach to, as the model is now."""

    def encoder_layers(self) -> Iterable[nn.TransformerEncoderLayer]:
        """The transformer encoder layers in the model, as it was when its modules were last asked for."""

    def take(self, site: Site, tensor: torch.Tensor, taken: list[Any]) -> None:
        """Measure a tensor as it is now, and add what is to be kept for the pass."""

    def judge(self, name: str, inputs: Any, output: Any, taken: list[Any]) -> None:
        """Look at a call of a module as a whole, and add what is to be kept for the pass.

        Args:
            name: Name of the module.
            inputs: Its positional arguments, as the call has left them.
            output: What it returned.
            taken: Where to add it.
        """

    def sees_through_graphs(self) -> bool:
        """Whether compiled regions run uncompiled now, so that modules in them are called one by one."""

    def inside_graph(self, names: Iterable[str]) -> None:
        """Modules that are part of a compiled graph and so are not observed."""

    def wants(self, site: Site) -> bool:
        """Whether this site is watched."""

    def wants_kind(self, kind: str) -> bool:
        """Whether anything of this kind is watched; always the same."""

    def failed(self, place: str, error: Exception) -> None:
        """An error of ours in a hook; may raise in strict mode."""


class Taps:
    """The hooks on one model: on its root and, on sampled steps, on each selected module.

    Args:
        model: The root; only a weak reference is kept.
        listener: Decides and takes tensors.
        always_tell: Whether the listener wants to know too when an exception leaves the root.
    """

    def __init__(self, model: nn.Module, listener: PassListener, always_tell: bool = False) -> None:
        keep_hooks_uncompiled()
        self.called: set[str] = set()
        """Names of the selected modules that were called while the taps were attached."""
        self.root_called = False
        """Whether the root was called to train while it had a hook."""
        self.backwards = 0
        """Passes since the last step through whose output gradients flowed back."""
        self.in_backward_of: ForwardPass | None = None
        """The pass whose backward began last; recomputations belong to it."""
        self._model = weakref.ref(model)
        self._listener = listener
        self._always_tell = always_tell
        self._root_hooks: list[_Attached] = []
        self._hooks: dict[str, _Attached] = {}
        # Made anew for each step they kept the garbage collector busy.
        self._taps: dict[str, tuple[Tap, RemovableHandle]] = {}
        self._are_attached = False
        self._leaf_handles: list[RemovableHandle] = []
        self._open: dict[int, ForwardPass] = {}
        self._waiting: list[ForwardPass] = []
        self._do_outputs_tell = False
        self._with_gradients = listener.wants_kind("activation_gradients")

    def watch_root(self) -> None:
        """Have the root report when it is called; does nothing where it does so already."""
        model = self._model()
        if self._root_hooks or model is None:
            return
        try:
            starts, ends = RootStarts(self, "", model), RootEnds(self, "", model)
            self._root_hooks.append((starts, model.register_forward_pre_hook(starts)))
            # `always_call`: the listener may have something to put back when an exception leaves the root.
            self._root_hooks.append((ends, model.register_forward_hook(ends, always_call=self._always_tell)))
        except Exception as error:
            self._listener.failed("the model itself", error)

    def leave_root(self) -> None:
        """Take the hook off the root, unless a graph was compiled with it in place."""
        if not self.is_root_traced:
            for _, handle in self._root_hooks:
                handle.remove()
            self._root_hooks.clear()

    def attach(self) -> None:
        """Attach to the selected modules; does nothing where that is done."""
        if self._are_attached:
            return
        self._are_attached = True
        is_compiled_call, is_root_traced = in_compiled_call(), self.is_root_traced
        everything = self._listener.sees_through_graphs()
        inside: list[str] = []
        entries = list(self._listener.modules())
        fused = _fused(self._listener.encoder_layers())
        for entry in entries:
            is_inside = entry.is_inside_compiled or (is_compiled_call and not entry.is_root) or is_root_traced
            if is_inside and not everything:
                inside.append(entry.name)
                continue
            # One that is there already was kept because a graph was compiled with it.
            if entry.name in self._hooks or id(entry.module) in fused:
                continue
            try:
                tap, handle = self._taps.get(entry.name, (None, None))
                if tap is None or not tap.is_of(entry.module):
                    tap, handle = Tap(self, entry.name, entry.module), None
                if handle is None or not put_back(handle, entry.module, tap):
                    handle = entry.module.register_forward_hook(tap)
                self._hooks[entry.name] = self._taps[entry.name] = tap, handle
            except Exception as error:
                self._listener.failed(entry.name, error)
        self._listener.inside_graph(inside)

    def detach(self) -> None:
        """Take the hooks off the selected modules, except for those that a graph was compiled with."""
        if not self._are_attached:
            return
        self._are_attached = False
        kept = {name: hook for name, hook in self._hooks.items() if hook[0].is_traced}
        for name, (_, handle) in self._hooks.items():
            if name not in kept:
                handle.remove()
        self._hooks = kept
        self._listener.inside_graph(kept)

    @property
    def is_root_traced(self) -> bool:
        """Whether the root was called from within a compiled function, and so is part of a graph itself."""
        return any(hook.is_traced for hook, _ in self._root_hooks)

    def collect(self, step: int) -> list[Any]:
        """What training passes yielded for a step since the last call, in the order of execution.

        A pass counts when gradients flowed back through its output. Where that happened to none, as when the
        output is a view that was changed in place and so lost its hooks, every complete pass counts. A pass that
        has no backward by the next step will not get one.

        Args:
            step: Number of the step whose optimizer asks; passes that an earlier one asked for are dropped.

        Returns:
            What the listener added for each of them, one pass behind the other.
        """
        if not self._waiting:
            return []
        for forward in self._waiting:
            if forward.complete and forward.step is None:
                forward.step = step
        self._waiting = [forward for forward in self._waiting if forward.step is None or forward.step >= step]
        complete = [forward for forward in self._waiting if forward.complete]
        confirmed = [forward for forward in complete if forward.counts]
        taken: list[Any] = []
        for forward in confirmed or [f for f in complete if not (f.is_loose or f.is_evaluation)]:
            taken += forward.taken
            forward.taken = []
        return taken

    def gradients_were_dropped(self) -> None:
        """Gradients are gone though no step used them: a step was skipped, and what its passes yielded counts not."""
        self._waiting = [forward for forward in self._waiting if forward.has_gradient is not True]

    def step_ended(self) -> None:
        """A step is over; backward passes are counted anew."""
        self.backwards = 0
        if not in_backward():
            self.in_backward_of = None
            for handle in self._leaf_handles:
                handle.remove()
            self._leaf_handles.clear()

    def close(self) -> None:
        """Take every hook off the model."""
        for _, handle in (*self._root_hooks, *self._hooks.values()):
            handle.remove()
        self._root_hooks.clear()
        self._hooks.clear()
        self._taps.clear()
        self._are_attached = False
        self.step_ended()
        self._waiting.clear()
        self._open.clear()

    def root_starts(self, module: nn.Module) -> None:
        """The root is called: decide whether to capture, and open a pass if so."""
        recomputes = in_backward()
        if is_transformed() or (recomputes and self.in_backward_of is not None):
            return
        thread = threading.get_ident()
        self._open.pop(thread, None)  # the last forward of this thread ended in an exception
        # In evaluation mode too, as `from_pretrained` leaves a model: gradients will tell whether it trains.
        training = torch.is_grad_enabled()
        self.root_called |= training and module.training
        if self._listener.forward_starts(training) and training:
            self.attach()
        elif not self._open and self.root_called:  # else the parts wait to be called, and evaluation must not end that
            self.detach()
        if training:
            # In backward without a pass that it belongs to: the root itself is under reentrant checkpointing, and
            # its first pass ran without gradients.
            self._open[thread] = forward = ForwardPass(recomputes, not module.training)
            self._wait(forward)

    def root_ends(self, output: Any) -> None:
        """The root has returned: the pass is complete, and waits for its backward."""
        has_failed = self._always_tell and sys.exc_info()[0] is not None
        if not in_backward():
            self._listener.forward_ends(has_failed)
        forward = self._open.pop(threading.get_ident(), None)
        if forward is None or has_failed:
            return
        try:
            self._complete(output, forward)
        except Exception as error:
            self._listener.failed("the model's output", error)

    def _wait(self, forward: ForwardPass) -> None:
        # Only where outputs tell: one that is a view and was changed in place has lost its hooks, not its backward.
        if self._do_outputs_tell and len(self._waiting) % LOOK_EVERY == LOOK_EVERY - 1:
            self._waiting = [waiting for waiting in self._waiting if not waiting.is_out_of_reach]
        self._waiting = [*self._waiting[1 - WAITING_PASSES :], forward]

    def _complete(self, output: Any, forward: ForwardPass) -> None:
        """A pass is complete; a hook on what it returned will tell whether gradients flow back."""
        forward.complete = True
        forward.has_gradient = True if forward.in_backward else None
        if forward.in_backward:
            self.backwards += 1
            return
        for _, tensor in named_tensors(output):
            if tensor.requires_grad:
                confirmation = Confirmation(self, forward)
                self._hook_tensor(tensor, confirmation)
                forward.outputs.append(weakref.ref(confirmation))
                forward.has_gradient = False

    def backward_starts(self, forward: ForwardPass) -> None:
        """Gradients flow back through the root's output of this pass."""
        if not forward.is_loose:
            self.in_backward_of = forward
            self.root_called = True
        self._do_outputs_tell = True
        self._listener.backward_starts()
        if not forward.has_gradient:
            forward.has_gradient = True
            self.backwards += 1

    def module_called(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A selected module has returned: measure what it returned."""
        try:
            if not self._are_attached or is_transformed():
                return
            self.called.add(name)
            forward = self._open.get(threading.get_ident())
            if in_backward() and (forward is None or not forward.in_backward):
                self._hook_recomputed(name, output)
                return
            if forward is not None:
                self._take(name, inputs, output, forward)
            elif torch.is_grad_enabled():
                # Called by itself, outside of any call of the root: a pass of its own.
                forward = ForwardPass(is_evaluation=not module.training)
                forward.is_loose = True
                self._wait(forward)
                self._take(name, inputs, output, forward)
                self._complete(output, forward)
        except Exception as error:
            self._listener.failed(name, error)

    def gradient_arrived(self, site: Site, gradient: torch.Tensor, forward: ForwardPass) -> None:
        """The gradient of a module's output is there: measure it."""
        try:
            self._listener.take(site, gradient, forward.taken)
        except Exception as error:
            self._listener.failed(site.name, error)

    def _take(self, name: str, inputs: Any, output: Any, forward: ForwardPass) -> None:
        outputs = (("", output),) if type(output) is torch.Tensor else named_tensors(output)
        for path, tensor in outputs:
            site = site_of("activations", name + path)
            if self._listener.wants(site):
                self._listener.take(site, tensor, forward.taken)
            if self._with_gradients and self._listener.wants(site := site_of("activation_gradients", name + path)):
                if tensor.requires_grad and torch.is_grad_enabled():
                    self._hook_tensor(tensor, GradientTap(self, site, forward))
                else:
                    forward.ungraded.add(site)
        self._listener.judge(name, inputs, output, forward.taken)

    def _hook_recomputed(self, name: str, output: Any) -> None:
        """Activation checkpointing computes again; only what had no gradient the first time gets a hook now."""
        forward = self.in_backward_of
        if forward is None or not torch.is_grad_enabled():
            return
        for path, tensor in named_tensors(output):
            site = Site("activation_gradients", name + path)
            if site in forward.ungraded and tensor.requires_grad:
                self._hook_tensor(tensor, GradientTap(self, site, forward))

    def _hook_tensor(self, tensor: torch.Tensor, hook: Callable[[torch.Tensor | None], None]) -> None:
        handle = tensor.register_hook(hook)
        if tensor.is_leaf:  # a leaf outlives the step, and with it our hook would
            self._leaf_handles.append(handle)


def _fused(layers: Iterable[nn.TransformerEncoderLayer]) -> set[int]:
    """Identities of the modules whose hooks would switch the fused path of a frozen encoder off, and change numbers."""
    return {
        id(part)
        for layer in layers
        if not (layer.training or any(parameter.requires_grad for parameter in layer.parameters()))
        for part in layer.modules()
    }
