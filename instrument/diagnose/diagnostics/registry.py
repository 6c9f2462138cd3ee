"""The one list of diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from instrument.config import Config
from instrument.diagnose.diagnostics.depth import activation_scale, gradient_scale
from instrument.diagnose.diagnostics.nonfinite import non_finite, skipped_step
from instrument.diagnose.diagnostics.outliers import outliers
from instrument.diagnose.diagnostics.parameters import frozen, no_gradient, unchanged
from instrument.diagnose.diagnostics.precision import near_overflow, underflow
from instrument.diagnose.diagnostics.spikes import clipped, gradient_spike, loss_spike
from instrument.diagnose.diagnostics.units import dead_units, saturated_units
from instrument.diagnose.diagnostics.updates import update_ratio
from instrument.diagnose.findings import Finding
from instrument.diagnose.readings import Reading

__all__ = ["DIAGNOSTICS", "ONCE", "Diagnostic"]

Diagnostic: TypeAlias = "Callable[[Sequence[Reading], Config], Iterable[Finding]]"
"""Says what is wrong on the newest of some readings, which are oldest first and never none."""

DIAGNOSTICS: tuple[Diagnostic, ...] = (
    non_finite,
    skipped_step,
    loss_spike,
    gradient_spike,
    update_ratio,
    dead_units,
    saturated_units,
    activation_scale,
    gradient_scale,
    no_gradient,
    unchanged,
    frozen,
    underflow,
    near_overflow,
    clipped,
    outliers,
)
"""Every diagnostic, the most urgent first."""

ONCE = frozenset({non_finite.__name__})
"""Diagnostics that tell of one event wherever it is seen: NaN spreads, and each step has another first offender."""
