"""Hooks: tensors are handed on from inside the forward pass and from gradient hooks."""

from instrument.capture.hooks.objects import InertHook
from instrument.capture.hooks.taps import PassListener, Taps

__all__ = ["InertHook", "PassListener", "Taps"]
