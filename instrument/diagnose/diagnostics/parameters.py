"""Parameters that take no part: without a gradient, without a change, or frozen."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from instrument.capture.names import Site, site_of
from instrument.config import Config
from instrument.diagnose.diagnostics.words import listed, newest
from instrument.diagnose.findings import UNDATED, Finding, Level, Standing
from instrument.diagnose.readings import GLOBAL_L2, Reading

__all__ = ["frozen", "no_gradient", "unchanged"]

_ROUNDING = 1e-4
"""Gradients of which size, of the largest of the network, may be mere rounding errors."""


def no_gradient(readings: Sequence[Reading], config: Config) -> Standing:
    """WARN: a parameter that asks for a gradient has none, or one of zeros, on all of the last readings."""
    recent = newest(readings, config.unused_checks, lambda reading: reading.values.get(GLOBAL_L2))
    last = readings[-1]
    have_one = frozenset[str]().union(*(reading.with_gradient for reading in recent))
    asking = last.asking if recent else ()
    lacking = [] if have_one.issuperset(asking) else [name for name in asking if name not in have_one]
    there: set[str] = set()
    for reading in reversed(recent):
        if not there.issuperset(lacking):
            there.update(reading.column("gradients", "abs_max"))
    are_there = tuple([name in there for name in lacking])
    return Standing(_without_gradients(tuple(lacking), are_there, len(recent)), last.step)


@functools.lru_cache(maxsize=16)
def _without_gradients(names: tuple[str, ...], are_there: tuple[bool, ...], readings: int) -> tuple[Finding, ...]:
    """What is said of parameters; it comes again each step, and where gradients vanish there are hundreds of them."""
    return tuple([_without_gradient(*each, readings) for each in zip(names, are_there, strict=True)])


def _without_gradient(name: str, is_there: bool, readings: int) -> Finding:
    what = "has a gradient of nothing but zeros" if is_there else "has never had a gradient"
    why = (
        "Nothing flows back to it: a dead layer, a detach() or a multiplication by zero lies behind it."
        if is_there
        else "Either nothing that leads to the loss uses it, or it was not given to the optimizer: check forward() "
        "and optimizer.param_groups, or set requires_grad to False if that is meant."
    )
    return Finding(
        Level.WARN, "no_gradient", site_of("gradients", name), UNDATED, 0.0, 0.0, "gradient",
        f"{name} {what} on the last {readings} readings, so it does not learn. {why}",
    )  # fmt: skip


def unchanged(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: a parameter has a gradient, and yet the optimizer did not change it at all; needs kind "updates".

    The gradient must be worth speaking of: a bias before a batch normalisation has one of mere rounding errors, which
    SGD cannot add to it. So it must be at least a ten-thousandth of the largest gradient of the network.
    """
    recent = newest(
        readings,
        config.unchanged_checks,
        lambda reading: reading.has("updates", "abs_max") and not reading.is_skipped,
    )
    if not recent:
        return
    last = readings[-1]
    for name, change in last.column("updates", "abs_max").items():
        if change != 0.0 or any(reading.get("updates", "abs_max", name) != 0.0 for reading in recent):
            continue
        if all(_has_gradient(reading, name) for reading in recent):
            yield Finding(
                Level.WARN, "unchanged", Site("updates", name), last.step, 0.0, 0.0, "update",
                f"{name} has a gradient and yet not one of its values has changed on the last {len(recent)} readings. "
                "Its learning rate is zero, or so small that the change is lost in rounding (in bfloat16, below 0.4 % "
                "of a value): raise it, or keep a copy of the parameters in float32.",
            )  # fmt: skip


def _has_gradient(reading: Reading, name: str) -> bool:
    gradients = reading.column("gradients", "abs_max")
    return name in gradients and gradients[name] > 0.0 and gradients[name] >= _ROUNDING * max(gradients.values())


def frozen(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """INFO: parameters that ask for no gradient, as in fine-tuning."""
    names = [name for name, traits in readings[-1].parameters.items() if not traits.requires_grad]
    if names:
        yield Finding(
            Level.INFO, "frozen", Site("parameters", names[0]) if len(names) == 1 else None, readings[-1].step,
            float(len(names)), 0.0, "parameters",
            f"frozen, since requires_grad is False: {listed(names)}. They do not learn; in fine-tuning that is meant.",
        )  # fmt: skip
