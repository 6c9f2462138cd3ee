"""Hooks: tensors are handed on from inside the forward pass and from gradient hooks."""

from instrument.capture.hooks.taps import PassListener, Taps

__all__ = ["PassListener", "Taps"]
