"""Narrow formats: values too small or too large for float16 and float8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.diagnostics.words import percent, place
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import RANGE_FRACTION, SUBNORMAL_FRACTION, Reading

__all__ = ["near_overflow", "underflow"]

_CHECKS = 3
"""Readings in a row: a scaler needs a few steps to find its scale."""


def underflow(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: most values of a gradient are below the smallest normal number of its format.

    Under autocast gradients of parameters are float32 again; those of activations (kind "activation_gradients") tell.
    """
    newest = readings[-1]
    for kind in ("activation_gradients", "gradients"):
        for name, share in newest.column(kind, SUBNORMAL_FRACTION).items():
            if share <= config.subnormal_fraction or newest.is_skipped:
                continue
            every = (reading.get(kind, SUBNORMAL_FRACTION, name) for reading in readings)
            series = [value for value in every if value is not None][-_CHECKS:]
            if len(series) == _CHECKS and min(series) > config.subnormal_fraction:
                site = Site(kind, name)
                yield Finding(
                    Level.WARN, "underflow", site, newest.step, share, config.subnormal_fraction, "of values",
                    f"{percent(share)} of {place(site)} lies below the smallest normal number of its narrow format, "
                    "where digits are lost and smaller values are already zero. Scale the loss up "
                    "(torch.amp.GradScaler), or use bfloat16.",
                )  # fmt: skip


def near_overflow(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: an activation or a parameter in float16 comes close to the largest number of that format."""
    newest = readings[-1]
    for kind in ("activations", "parameters"):
        for name, share in newest.column(kind, RANGE_FRACTION).items():
            if share > config.range_fraction:
                site = Site(kind, name)
                yield Finding(
                    Level.WARN, "near_overflow", site, newest.step, share, config.range_fraction, "of the range",
                    f"{place(site)} reaches {percent(share)} of the largest number of float16, 65504; beyond it is "
                    "infinity. Use bfloat16, keep this layer in float32, or normalise its input.",
                )  # fmt: skip
