"""How far steps go: the size of updates over the size of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import LOG10_RATIO, Reading

__all__ = ["update_ratio"]


def update_ratio(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN above the band, INFO below it: a matrix changes by too much or too little of itself, step after step."""
    high, low = config.update_ratio_high, config.update_ratio_low
    for name, ratio in readings[-1].column("updates", LOG10_RATIO).items():
        site = Site("updates", name)
        if ratio > high and _lasts(readings, name, lambda value: value > high, config.update_ratio_checks):
            yield Finding(
                Level.WARN, "update_ratio", site, readings[-1].step, ratio, high, "log10",
                f"each step changes {name} by {100 * 10**ratio:.2g} % of its size, and has done so for "
                f"{config.update_ratio_checks} readings; 0.1 % is usual. Lower the learning rate, at least for this "
                "layer.",
            )  # fmt: skip
        elif ratio < low and _lasts(readings, name, lambda value: value < low, config.update_ratio_checks):
            yield Finding(
                Level.INFO, "update_ratio", site, readings[-1].step, ratio, low, "log10",
                f"each step changes {name} by only {100 * 10**ratio:.2g} % of its size, and has done so for "
                f"{config.update_ratio_checks} readings; 0.1 % is usual. At the end of a schedule and in fine-tuning "
                "that is meant; at the beginning of a training, raise the learning rate.",
            )  # fmt: skip


def _lasts(readings: Sequence[Reading], name: str, is_outside: Callable[[float], bool], checks: int) -> bool:
    """Whether the last so many ratios of a parameter lie outside; readings without one are passed over."""
    count = 0
    for reading in reversed(readings):
        ratio = reading.get("updates", LOG10_RATIO, name)
        if ratio is None:
            continue
        if not is_outside(ratio):
            return False
        count += 1
        if count >= checks:
            return True
    return False
