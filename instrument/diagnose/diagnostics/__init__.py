"""Diagnostics: each one function from readings to findings.

A diagnostic is given the last readings, oldest first and never none, and says what is wrong on the newest of them;
whether that was said before is not its business. A new one is one function, listed in `DIAGNOSTICS`, with its
thresholds in `instrument.config.thresholds`.
"""

from instrument.diagnose.diagnostics.depth import activation_scale, gradient_scale
from instrument.diagnose.diagnostics.nonfinite import non_finite, skipped_step
from instrument.diagnose.diagnostics.outliers import outliers
from instrument.diagnose.diagnostics.parameters import frozen, no_gradient, unchanged
from instrument.diagnose.diagnostics.precision import near_overflow, underflow
from instrument.diagnose.diagnostics.registry import DIAGNOSTICS, Diagnostic
from instrument.diagnose.diagnostics.spikes import clipped, gradient_spike, loss_spike
from instrument.diagnose.diagnostics.units import dead_units, saturated_units
from instrument.diagnose.diagnostics.updates import update_ratio

__all__ = [
    "DIAGNOSTICS",
    "Diagnostic",
    "activation_scale",
    "clipped",
    "dead_units",
    "frozen",
    "gradient_scale",
    "gradient_spike",
    "loss_spike",
    "near_overflow",
    "no_gradient",
    "non_finite",
    "outliers",
    "saturated_units",
    "skipped_step",
    "unchanged",
    "underflow",
    "update_ratio",
]
