"""Outlier features: single activations that dwarf all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import Reading

__all__ = ["outliers"]


def outliers(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """INFO: an output whose largest value is hundreds of times its root mean square, as trained transformers have."""
    newest = readings[-1]
    large = [pair for pair in newest.column("activations", "abs_max").items() if pair[1] > config.outlier_abs_max]
    sizes = newest.column("activations", "rms") if large else {}
    for name, most in large:
        size = sizes.get(name, 0.0)
        if size > 0.0 and most > config.outlier_ratio * size:
            yield Finding(
                Level.INFO, "outliers", Site("activations", name), newest.step, most / size, config.outlier_ratio,
                "rms",
                f"a few of its values are outliers: the largest is {most:.3g}, {most / size:.0f} times the root mean "
                "square. Trained transformers have such features; they matter where activations are quantized or kept "
                "in float16.",
            )  # fmt: skip
