"""Spikes of the loss and of the gradient norm, and gradients that are always clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from instrument.config import Config
from instrument.diagnose.diagnostics.words import percent
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import GLOBAL_L2, Reading

__all__ = ["clipped", "gradient_spike", "loss_spike"]

_SMALLEST_SPIKE = 2.0
"""A spike is at least a doubling: a norm that is clipped has next to no standard deviation."""

_SAME = 1e-3
"""Norms that differ by less, relatively, are the same; clipping leaves them equal to 1e-6."""

_FEWEST = 20
"""Readings before it is said that gradients are clipped."""


def loss_spike(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: the loss lies far above those of the window before it."""
    losses = [(reading, reading.loss) for reading in readings]
    found = _spike([(reading, loss) for reading, loss in losses if loss is not None], readings[-1], config)
    if found is not None:
        value, limit = found
        yield Finding(
            Level.WARN, "loss_spike", None, readings[-1].step, value, limit, "loss",
            f"the loss jumped to {value:.3g}, where at most {limit:.3g} was to be expected from the readings before. "
            "If it comes back down by itself, little is lost; if it happens again, lower the learning rate, clip "
            "gradients, or look at the batch of that step.",
        )  # fmt: skip


def gradient_spike(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: the norm of all gradients lies far above those of the window before it."""
    norms = [(reading, reading.values[GLOBAL_L2]) for reading in readings if GLOBAL_L2 in reading.values]
    if readings[-1].is_skipped:
        return
    found = _spike(norms, readings[-1], config)
    if found is not None:
        value, limit = found
        yield Finding(
            Level.WARN, "gradient_spike", None, readings[-1].step, value, limit, "norm",
            f"the norm of all gradients jumped to {value:.3g}, where at most {limit:.3g} was to be expected from the "
            "readings before. Clip gradients (torch.nn.utils.clip_grad_norm_), lower the learning rate or warm it up, "
            "or look at the batch of that step.",
        )  # fmt: skip


def _spike(series: list[tuple[Reading, float]], newest: Reading, config: Config) -> tuple[float, float] | None:
    """The newest value and the limit that it is above; None where it is not."""
    if not series or series[-1][0] is not newest or not math.isfinite(series[-1][1]):
        return None
    value = series[-1][1]
    past = [number for _, number in series[-config.spike_window - 1 : -1] if math.isfinite(number) and number > 0.0]
    if len(past) < config.spike_window // 4 or value <= 0.0:
        return None
    logs = [math.log10(number) for number in past]
    mean = math.fsum(logs) / len(logs)
    deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in logs) / len(logs))
    limit = 10.0 ** (mean + max(config.spike_sigma * deviation, math.log10(_SMALLEST_SPIKE)))
    return (value, limit) if value > limit else None


def clipped(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """INFO: on most readings the gradient norm is one and the same maximum, so that clipping decides every step."""
    window = readings[-config.spike_window :]
    norms = [reading.values[GLOBAL_L2] for reading in window if reading.values.get(GLOBAL_L2)]
    if len(norms) < _FEWEST or GLOBAL_L2 not in readings[-1].values:
        return
    most = max(norms)
    share = sum(norm >= most * (1.0 - _SAME) for norm in norms) / len(norms)
    if share > config.clipped_fraction:
        yield Finding(
            Level.INFO, "clipped", None, readings[-1].step, share, config.clipped_fraction, "of readings",
            f"on {percent(share)} of the readings the norm of all gradients is exactly {most:.3g}: they are clipped "
            "nearly always, so that the learning rate alone decides how far a step goes. That can be meant; if not, "
            "raise the limit or lower the learning rate.",
        )  # fmt: skip
