"""Dead and saturated layers, by the state of their units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.diagnostics.words import leaves, percent
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import Reading

__all__ = ["BOUNDED", "dead_units", "saturated_units"]

BOUNDED = frozenset({"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign"})
"""Nonlinearities that are flat at both ends; of the others, to be flat on half of all samples is to work."""

_SURE_WINDOWS = 2
"""Full windows in a row before a dead layer is critical: units do come back."""


def dead_units(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN or CRIT: a good part of a layer's units was flat on every sample of a whole window."""
    for name, status in readings[-1].units.items():
        if status.verdict != "dead" or not status.units:
            continue
        share = len(status.dead) / status.units
        if share < config.dead_fraction_warn:
            continue
        is_critical = share >= config.dead_fraction_crit and status.windows >= _SURE_WINDOWS
        limit = config.dead_fraction_crit if is_critical else config.dead_fraction_warn
        yield Finding(
            Level.CRIT if is_critical else Level.WARN, "dead_units", Site("activations", name), readings[-1].step,
            share, limit, "of units",
            f"{len(status.dead)} of {status.units} units ({percent(share)}) were silent on each of the last "
            f"{status.samples} samples, so they pass on nothing and learn nothing; each fires on fewer than "
            f"{percent(status.rate_bound)} of all samples (95 % sure). Lower the learning rate, warm it up, or use a "
            "nonlinearity that is not flat, such as LeakyReLU or GELU.",
        )  # fmt: skip


def saturated_units(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN or CRIT: a tanh or sigmoid is at its ends on a good part of all samples.

    The module that is executed last is exempt: at the output of a network a sure answer is a saturated one.
    """
    newest = readings[-1]
    bounded = {name: status for name, status in newest.units.items() if status.function in BOUNDED}
    if not bounded:
        return
    for name, status in bounded.items():
        if status.verdict in ("no-data", "watching") or not status.saturated or name in _last(readings):
            continue
        share = sum(status.saturated) / len(status.saturated)
        if share <= config.saturated_fraction_warn:
            continue
        is_critical = share > config.saturated_fraction_crit and status.saturated_windows >= _SURE_WINDOWS
        limit = config.saturated_fraction_crit if is_critical else config.saturated_fraction_warn
        yield Finding(
            Level.CRIT if is_critical else Level.WARN, "saturated_units", Site("activations", name), newest.step,
            share, limit, "of samples",
            f"on {percent(share)} of all samples its units sit at an end of {status.function}, where it is flat, so "
            "that hardly any gradient passes. Scale its input down (a smaller initialisation, a normalisation before "
            "it), lower the learning rate, or use another nonlinearity.",
        )  # fmt: skip


def _last(readings: Sequence[Reading]) -> list[str]:
    """The module executed last, by the newest reading that has activations."""
    return next((names[-1:] for names in map(leaves, reversed(readings)) if names), [])
