"""Where two runs part: the layers and the steps from which on their statistics differ.

For each statistic that both runs have, d(t) = ln a(t) - ln b(t) over their common steps. What d has to exceed, three
common steps in a row and with one sign, depends on how the runs begin:

* **They begin alike** (same seed, same initial values): until something differs d is zero but for rounding. More than
  5 % is a parting.
* **They begin differently** (another seed): the difference at the first step is taken off, unless it is above a
  factor of two. Noise: if ln a is a slow trend plus independent noise of variance s², its step-to-step changes have the
  variance 2s², whatever the trend; d(t) - d(0) has the variance 2s_a² + 2s_b², so its standard deviation is that of the
  changes of both runs together, which 1.4826 times their median absolute deviation estimates undisturbed by what a few
  steps do (Rousseeuw and Croux, 1993). More than five of those, and more than a factor of two, is a parting. Head
  start: one of two seeds learns sooner, and what changes quickly then differs by a factor of four for a while; so a
  value is held against all values of the other run from two thirds of its step to one and a half times its step.

Measured on networks of three and four layers on scikit-learn's digits, 300 steps: of sixty pairs of seeds of one recipe
(Adam, Adam five times hotter, SGD, Tanh), 60 of 3420 statistics part. A learning rate that rises fivefold at step 100
is found at step 101 where the seed is the same; one that rises twentyfold, at step 105 where it is another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console

from instrument.diagnose.tables import Column, FittedTable
from instrument.errors import RunError
from instrument.record.reading import Scalars
from instrument.record.tags import COUNTS, Tag

__all__ = ["Comparison", "Parting", "compare"]

FloatArray: TypeAlias = "npt.NDArray[np.float64]"
Site: TypeAlias = "tuple[str, str]"

STATISTICS = ("rms", "std")
"""Statistics that are compared by their ratio."""

NON_FINITE = "non-finite"
"""Stands where a statistic stands, for values that are NaN or Inf in one run only."""

ALIKE_BAND = math.log(1.05)
DIFFERENT_BAND = math.log(2)
NOISE_WIDTHS = 5.0
HEAD_START = 1.5
SUSTAINED_STEPS = 3
ALIKE_PRECISION = 1e-6
ALIKE_SHARE = 0.1
"""Share of the spreads that agree at the first step of runs that begin alike: a change to one layer leaves those before
it as they were, and two seeds agree in nothing but constants, which have no spread."""

_COLUMNS = (Column("layer", is_text=True), Column("what parts first", is_text=True), Column("at step"),
            Column("A", rank=3), Column("B", rank=2), Column("B / A", rank=1))  # fmt: skip

FORWARD, BACKWARD, OPTIMIZER = range(3)
PHASES = {
    "activations": FORWARD,
    "activation_gradients": BACKWARD,
    "gradients": BACKWARD,
    "updates": OPTIMIZER,
    "parameters": OPTIMIZER,
}
"""When in a step a kind comes about."""

NORMAL_DEVIATION = 1.4826
SMALLEST, LARGEST = 1e-45, 3.4e38
"""Bounds of float32, which scalars of event files are: zero has a logarithm that way."""


@dataclasses.dataclass(frozen=True)
class Parting:
    """One statistic that differs between two runs from a step on."""

    kind: str
    name: str
    statistic: str
    """Name of a statistic, or "non-finite"."""
    step: int
    """The first step of those that differ."""
    first: float
    """Value of the first run at that step; for "non-finite", how many values were."""
    second: float

    @property
    def ratio(self) -> float | None:
        """Second over first; None where that says nothing."""
        return self.second / self.first if self.first and self.statistic != NON_FINITE else None

    @property
    def layer(self) -> str:
        """Name of the module: of a parameter the one that holds it."""
        if self.kind in ("activations", "activation_gradients"):
            return self.name
        return self.name.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two runs have in common and where they part; printing it gives a sentence and a table."""

    partings: tuple[Parting, ...]
    """By step; those of one step as they come about: forward, backward, then what the optimizer changes."""
    layers: tuple[str, ...]
    """Names of layers in the order in which they run."""
    compared: int
    """How many statistics both runs have."""
    steps: tuple[int, int]
    """First and last common step."""
    alike: bool
    """Whether the runs begin with the same values."""

    def sentence(self) -> str:
        """What was found, in words."""
        beginning = (
            "They begin alike, so more than 5 % counts."
            if self.alike
            else "They begin with different values, so what noise or a head start explains does not count."
        )
        span = f"{self.compared} statistics from step {self.steps[0]} to step {self.steps[1]}"
        if not self.partings:
            return f"The runs do not part: {span} stay together. {beginning}"
        earliest = self.partings[0]
        layers = len(self.by_layer())
        what = f"{earliest.kind.replace('_', ' ')} of {earliest.name}"
        if earliest.statistic == NON_FINITE:
            values = f"{earliest.first:.0f} values are NaN or Inf in A, {earliest.second:.0f} in B"
        else:
            values = f"{earliest.statistic} {earliest.first:.3g} in A, {earliest.second:.3g} in B"
        others = f"; {layers} layers part in all" if layers > 1 else ""
        return f"The runs part at step {earliest.step}, first in the {what}: {values}{others}. {beginning}"

    def by_layer(self) -> list[Parting]:
        """The earliest parting of each layer that parts, in the order in which layers run."""
        earliest: dict[str, Parting] = {}
        for parting in self.partings:
            earliest.setdefault(parting.layer, parting)
        order = {layer: position for position, layer in enumerate(self.layers)}
        return sorted(earliest.values(), key=lambda parting: order[parting.layer])

    def table(self) -> FittedTable:
        """A row for each layer that parts, for `rich` consoles."""
        rows = []
        for parting in self.by_layer():
            ratio = "" if parting.ratio is None else f"{parting.ratio:.3g}"
            leaf = parting.name.rpartition(".")[2] if parting.name != parting.layer else parting.kind
            what = (
                f"{leaf} {parting.statistic}" if leaf == parting.kind else f"{leaf} {parting.kind} {parting.statistic}"
            )
            cells = (parting.layer or "(root)", what.replace("_", " "), str(parting.step), f"{parting.first:.3g}",
                     f"{parting.second:.3g}", ratio)  # fmt: skip
            rows.append((cells, "bold red" if parting.statistic == NON_FINITE else ""))
        return FittedTable(_COLUMNS, rows, elsewhere="--json has all")

    def print_to(self, console: Console) -> None:
        """Print the sentence, and the table where there is something in it."""
        console.print(self.sentence(), markup=False, highlight=False, soft_wrap=True)
        if self.partings:
            console.print(self.table())

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        partings = [{**dataclasses.asdict(parting), "ratio": parting.ratio} for parting in self.partings]
        return {
            "sentence": self.sentence(),
            "alike": self.alike,
            "compared": self.compared,
            "steps": list(self.steps),
            "partings": partings,
        }


@dataclasses.dataclass(frozen=True)
class _Series:
    """One statistic of both runs at their common steps, as logarithms."""

    tag: Tag
    steps: npt.NDArray[np.int64]
    first: FloatArray
    second: FloatArray


def compare(first: Scalars, second: Scalars) -> Comparison:
    """Find where two runs part.

    Args:
        first: Scalars of a run, as `instrument.record.reading.read_scalars` gives them.
        second: Those of another.

    Returns:
        The comparison.

    Raises:
        RunError: The runs have no statistic or no step in common.

    Example:
        >>> steady = {Tag("gradients", "rms", "head.weight"): {step: 1.0 for step in range(10)}}
        >>> grows = {Tag("gradients", "rms", "head.weight"): {step: 1.0 + (step > 4) for step in range(10)}}
        >>> compare(steady, grows).partings[0].step
        5
    """
    common = [tag for tag in first if tag in second and tag.statistic in STATISTICS]
    if not common:
        raise RunError(
            f"the runs have no statistic in common: the first has {_names(first)}, the second {_names(second)}"
        )
    series = [found for tag in common if (found := _series(tag, first[tag], second[tag])) is not None]
    if not series:
        raise RunError(
            f"the runs have no step in common: the first has steps {_span(first)}, the second {_span(second)}"
        )
    alike = _begin_alike(series)
    partings = [
        Parting(tag.kind, tag.name, str(tag.statistic), step, first[tag][step], second[tag][step])
        for tag, step in ((each.tag, _parting_step(each, alike)) for each in series)
        if step is not None
    ]
    partings += _non_finite_partings(first, second)
    layers = _layers(first, partings)
    order = {layer: position for position, layer in enumerate(layers)}

    def moment(parting: Parting) -> tuple[int, int, int]:
        phase, position = PHASES[parting.kind], order[parting.layer]
        return parting.step, phase, -position if phase == BACKWARD else position

    partings.sort(key=moment)
    steps = np.concatenate([each.steps for each in series])
    return Comparison(tuple(partings), layers, len(series), (int(steps.min()), int(steps.max())), alike)


def _series(tag: Tag, first: dict[int, float], second: dict[int, float]) -> _Series | None:
    steps = sorted(first.keys() & second.keys())
    if not steps:
        return None
    logs = (np.log(np.clip([values[step] for step in steps], SMALLEST, LARGEST)) for values in (first, second))
    return _Series(tag, np.array(steps), *logs)


def _begin_alike(series: list[_Series]) -> bool:
    """Whether the runs begin with the same values."""
    spreads = [each for each in series if each.tag.statistic == "std" and each.first[0] > math.log(SMALLEST)]
    same = sum(abs(each.first[0] - each.second[0]) < ALIKE_PRECISION for each in spreads or series)
    return bool(same >= ALIKE_SHARE * len(spreads or series))


def _parting_step(series: _Series, alike: bool) -> int | None:
    """The first of the steps in a row at which a statistic differs by more than is explained; None for never."""
    if alike:
        difference, band = series.first - series.second, ALIKE_BAND
    else:
        start = series.first[0] - series.second[0]
        shifted = series.second + (start if abs(start) <= DIFFERENT_BAND else 0.0)
        difference = _beyond_head_start(series.steps, series.first, shifted)
        band = max(DIFFERENT_BAND, NOISE_WIDTHS * math.hypot(_wander(series.first), _wander(series.second)))
    sides = np.sign(difference) * (np.abs(difference) > band)
    needed = min(SUSTAINED_STEPS, len(sides))
    runs = np.lib.stride_tricks.sliding_window_view(sides, needed)
    found = np.flatnonzero(np.abs(runs.sum(axis=1)) == needed)
    return int(series.steps[found[0]]) if found.size else None


def _wander(logs: FloatArray) -> float:
    """Standard deviation of the step-to-step changes, undisturbed by a few large ones."""
    changes = np.diff(logs)
    return NORMAL_DEVIATION * float(np.median(np.abs(changes - np.median(changes)))) if changes.size else 0.0


def _beyond_head_start(steps: npt.NDArray[np.int64], first: FloatArray, second: FloatArray) -> FloatArray:
    """By how much a value lies outside what the other run shows around its step; the larger of both directions."""
    starts = np.searchsorted(steps, steps / HEAD_START)
    ends = np.searchsorted(steps, steps * HEAD_START, side="right")
    ahead = np.maximum((HEAD_START - 1) * steps, 1)
    missing = np.clip((steps + ahead - steps[-1]) / ahead, 0, 1)

    def beyond(values: FloatArray, others: FloatArray) -> FloatArray:
        padded = np.append(others, others[-1])  # an end may be one past the last
        pairs = np.stack((starts, ends), axis=1).ravel()
        low, high = np.minimum.reduceat(padded, pairs)[::2], np.maximum.reduceat(padded, pairs)[::2]
        # Past the end of the run nothing is known: as much change as there was is granted.
        granted = missing * (high - low)
        outside: FloatArray = np.maximum(values - high - granted, 0) - np.maximum(low - granted - values, 0)
        return outside

    one, other = beyond(first, second), -beyond(second, first)
    return np.where(np.abs(one) >= np.abs(other), one, other)


def _non_finite_partings(first: Scalars, second: Scalars) -> Iterator[Parting]:
    """Sites with NaN or Inf in one run only, at the first step that both runs measured."""
    counts = [_non_finite_counts(scalars) for scalars in (first, second)]
    for site in counts[0].keys() & counts[1].keys():
        one, other = counts[0][site], counts[1][site]
        for step in sorted(one.keys() & other.keys()):
            if bool(one[step]) != bool(other[step]):
                yield Parting(*site, NON_FINITE, step, one[step], other[step])
                break


def _non_finite_counts(scalars: Scalars) -> dict[Site, dict[int, float]]:
    """By site and measured step, how many values were NaN or Inf."""
    found: dict[Site, dict[int, float]] = {}
    for tag, values in scalars.items():
        of_site = found.setdefault((tag.kind, tag.name), {})
        for step, value in values.items():
            of_site[step] = of_site.get(step, 0.0) + (value if tag.statistic in COUNTS else 0.0)
    return found


def _layers(scalars: Scalars, partings: Iterable[Parting]) -> tuple[str, ...]:
    """Layers in the order of their outputs, as they were recorded; then those of which only parameters are known."""
    outputs = [tag.name for tag in scalars if tag.kind == "activations"]
    return tuple(dict.fromkeys([*outputs, *(parting.layer for parting in partings)]))


def _names(scalars: Scalars) -> str:
    names = list(dict.fromkeys(f"{tag.kind} of {tag.name}" for tag in scalars if tag.statistic in STATISTICS))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else "none"


def _span(scalars: Scalars) -> str:
    steps = [step for values in scalars.values() for step in values]
    return f"{min(steps)} to {max(steps)}"
