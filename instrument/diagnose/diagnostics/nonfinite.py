"""NaN and Inf: where they come from.

The first offender in the order of execution is the one to look at; all that comes after it only passes them on. Not
every Inf is a fault: attention masks are made of it, and gradient scalers drive gradients there on purpose and have
the optimizer skip the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.diagnostics.words import place
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import RANGE_FRACTION, Reading

__all__ = ["non_finite", "skipped_step"]

_GRADIENTS = ("activation_gradients", "gradients")


def non_finite(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """CRIT: NaN or Inf, at the first place in the order of execution.

    Inf in activations alone is no fault: masks are made of it. Neither is anything in gradients where the parameters
    are finite after the step: it was skipped.
    """
    newest = readings[-1]
    if not _is_faulty(newest):
        return
    earlier = readings[-2] if len(readings) > 1 else None
    masks = set() if earlier is None or _is_faulty(earlier) else set(_counts(earlier, "inf_count"))
    nans, infs = _counts(newest, "nan_count"), _counts(newest, "inf_count")
    offender = next(
        (site for site in newest.sites if site in nans or (site in infs and site not in masks)),
        None,
    )
    since = "at the first step that was sampled" if earlier is None else f"after step {earlier.step}, which had none"
    if offender is None:
        yield Finding(
            Level.CRIT, "non_finite", None, newest.step, math.nan, 0.0, "loss",
            f"the loss is {newest.loss} and nothing that is watched is ({since}): look at what is computed between the "
            "model's output and the loss, such as a division or a logarithm of zero.",
        )  # fmt: skip
        return
    number = nans.get(offender, 0.0) + infs.get(offender, 0.0)
    what = "NaN" if not infs.get(offender) else "Inf" if not nans.get(offender) else "NaN and Inf"
    yield Finding(
        Level.CRIT, "non_finite", offender, newest.step, number, 0.0, "values",
        f"{place(offender)} is the first to hold {what} ({number:.0f} values, {since}); everything after it only "
        f"passes that on. {_advice(newest, offender)}",
    )  # fmt: skip


def skipped_step(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """INFO: gradients overflowed, and the step was skipped, as a gradient scaler does while it looks for its scale."""
    newest = readings[-1]
    if newest.is_finite:
        return
    spoilt = sum(len(newest.column(kind, count)) for kind in _GRADIENTS for count in ("nan_count", "inf_count"))
    if spoilt and _was_skipped(newest) and not _is_faulty(newest):
        yield Finding(
            Level.INFO, "skipped_step", None, newest.step, float(spoilt), 0.0, "tensors",
            "gradients were infinite and the optimizer left the parameters as they were: a gradient scaler does so now "
            "and then while it looks for its scale. Only where it happens on most steps is something wrong.",
        )  # fmt: skip


def _counts(reading: Reading, statistic: str) -> dict[Site, float]:
    """Sites with NaN or Inf, and how many."""
    kinds = ("activations", "activation_gradients", "gradients", "updates", "parameters")
    return {
        Site(kind, name): count for kind in kinds for name, count in reading.column(kind, statistic).items() if count
    }


def _is_faulty(reading: Reading) -> bool:
    if reading.loss is not None and not math.isfinite(reading.loss):
        return True
    if reading.is_finite:
        return False
    nans, infs = _counts(reading, "nan_count"), _counts(reading, "inf_count")
    harmless = _GRADIENTS if _was_skipped(reading) else ()
    return any(site.kind not in harmless for site in nans) or any(
        site.kind not in ("activations", *harmless) for site in infs
    )


def _was_skipped(reading: Reading) -> bool:
    """Whether the optimizer made nothing of the gradients: by its own word, or since the parameters are finite."""
    if reading.is_skipped:
        return True
    spoilt = any(any(reading.column("parameters", count).values()) for count in ("nan_count", "inf_count"))
    return reading.has("parameters", "rms") and not spoilt


def _advice(reading: Reading, offender: Site) -> str:
    if reading.get(offender.kind, RANGE_FRACTION, offender.name) is not None:
        return "It is in float16, which ends at 65504: use bfloat16, or keep this layer in float32."
    if offender.kind == "activations":
        return (
            "Look in that layer for a division, a logarithm or a root of zero; check the input; lower the "
            "learning rate."
        )
    if offender.kind == "parameters":
        return "The step itself made it: lower the learning rate, or clip gradients."
    return (
        "The outputs are still finite, so a derivative is not: look for a root or a logarithm at zero, clip gradients, "
        "or find the line with torch.autograd.set_detect_anomaly(True)."
    )
