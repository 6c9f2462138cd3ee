"""Readings: one sampled step as plain numbers, made of a live record and of a run's event files alike.

Diagnostics see nothing else, so what they find live they find again in a finished run. A few numbers cannot be worked
out of the scalars that are written anyway; those are in `DERIVED` and are written beside them:

* ``Gradients.l2/_global``: norm of all gradients that are watched, together;
* ``Gradients.skipped/_global``: 1 where a gradient scaler had the optimizer skip the step; absent otherwise;
* ``Updates.log10_ratio/{parameter}``: log10 of the size of the update over that of the parameter after it, of matrices
  and larger alone (a bias begins at zero, so that its ratio says nothing);
* ``{Kind}.subnormal_fraction/{name}``, of tensors in float16 or float8 alone: the share of the non-zero values that
  are below the smallest normal number of the format; ``{Kind}.range_fraction/{name}``, of float16 alone: the largest
  magnitude over the largest number of the format. bfloat16 has the range of float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from instrument.capture.names import Site
from instrument.diagnose.numbers import Numbers
from instrument.diagnose.units import UnitStatus
from instrument.measure.histogram import FloatArray, count_below
from instrument.measure.sketch import Sketch
from instrument.record.buffer import StepRecord, Traits
from instrument.record.statistics import COLUMNS
from instrument.record.tags import COUNTS, Tag, parse_tag

__all__ = [
    "DERIVED",
    "GLOBAL",
    "GLOBAL_L2",
    "GUIDE",
    "LOG10_RATIO",
    "RANGE_FRACTION",
    "SKIPPED",
    "SUBNORMAL_FRACTION",
    "UPDATE_GUIDE",
    "ParameterTraits",
    "Reading",
]

GLOBAL = "_global"
"""Stands where a name stands, for the network as a whole."""

GUIDE = "_guide"
"""Stands where a name stands, for a line to compare with."""

UPDATE_GUIDE = -3.0
"""The usual log10 of the size of updates over that of weights: Karpathy, "makemore" part 3, 2022; cs231n."""

LOG10_RATIO = "log10_ratio"
SUBNORMAL_FRACTION = "subnormal_fraction"
RANGE_FRACTION = "range_fraction"
GLOBAL_L2 = Tag("gradients", "l2", GLOBAL)
SKIPPED = Tag("gradients", "skipped", GLOBAL)
DERIVED = frozenset({"l2", "skipped", LOG10_RATIO, SUBNORMAL_FRACTION, RANGE_FRACTION})
"""Statistics that are written because a reading needs them."""

_MATRIX = 2
"""Dimensions of a matrix, of whose updates a ratio is told."""

_EVERY = frozenset(COLUMNS) | DERIVED
_NARROW_MAX = 1e6
"""Formats that end below this are narrow: float16 and float8."""


class ParameterTraits(NamedTuple):
    """What a parameter is besides its values."""

    ndim: int
    requires_grad: bool


NO_UNITS: Mapping[str, UnitStatus] = MappingProxyType({})
NO_PARAMETERS: Mapping[str, ParameterTraits] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Reading:
    """One sampled step as numbers.

    Example:
        >>> from instrument import measure
        >>> record = StepRecord(7, {"Gradients/fc.weight": measure(torch.tensor([3.0, 4.0]))}, 0.0)
        >>> reading = Reading.of_record(record)
        >>> reading.step, reading.get("gradients", "abs_max", "fc.weight"), reading.values[GLOBAL_L2]
        (7, 4.0, 5.0)
    """

    step: int
    values: Mapping[Tag, float]
    """In the order of execution: activations, their gradients, gradients of parameters, updates, parameters."""
    units: Mapping[str, UnitStatus] = dataclasses.field(default_factory=dict)
    """Module to the state of its units, where that was judged on this step."""
    loss: float | None = None
    """The training loss, where the user logs one."""
    parameters: Mapping[str, ParameterTraits] = dataclasses.field(default_factory=dict)
    """Name of each parameter to what it is; of this step or an earlier one."""

    @classmethod
    def of_record(
        cls,
        record: StepRecord,
        units: Mapping[str, UnitStatus] = NO_UNITS,
        loss: float | None = None,
        parameters: Mapping[str, ParameterTraits] = NO_PARAMETERS,
    ) -> Reading:
        """Read a step record.

        Args:
            record: Of a live watch.
            units: The state of the units after the step, where it was judged.
            loss: The training loss of the step.
            parameters: What parameters are that the record says nothing of.

        Returns:
            The reading.
        """
        tags = record.tags
        numbers = Numbers(tags, record.statistics(), {})
        further: dict[Tag, float] = {}
        known, narrow = _about(record.traits)
        for tag in narrow:
            kind, _, name = _parsed(tag)
            further.update(_of_narrow(kind, name, record[tag], record.traits[tag]))
        gradients = numbers.rows("gradients")
        if gradients.size:
            further[GLOBAL_L2] = math.sqrt(record.columns().column("total_squares")[gradients].sum())
        if record.skipped:
            further[SKIPPED] = 1.0
        further.update(_ratios(numbers, known))
        merged = {**parameters, **known}
        values = Numbers(tags, record.statistics(), further)
        return cls(record.step, values, units, loss, parameters if merged == parameters else merged)

    @classmethod
    def of_scalars(
        cls,
        step: int,
        scalars: Mapping[Tag, float],
        units: Mapping[str, UnitStatus] = NO_UNITS,
        loss: float | None = None,
        parameters: Mapping[str, ParameterTraits] = NO_PARAMETERS,
    ) -> Reading:
        """Read the scalars that were written of a step.

        Args:
            step: The step.
            scalars: Tag to value, in the order in which they were written.
            units: The state of the units after the step, where it was written.
            loss: The training loss of the step.
            parameters: What parameters are.

        Returns:
            The reading.
        """
        values = {tag: value for tag, value in scalars.items() if tag.statistic in _EVERY and tag.name != GUIDE}
        return cls(step, values, units, loss, parameters)

    def joined(self, later: Reading) -> Reading:
        """This reading with another of the same step, where a second optimizer made its part of it late."""
        values = {**self.values, **later.values}
        if GLOBAL_L2 in self.values and GLOBAL_L2 in later.values:
            values[GLOBAL_L2] = math.hypot(self.values[GLOBAL_L2], later.values[GLOBAL_L2])
        return dataclasses.replace(later, values=values, units={**self.units, **later.units})

    def get(self, kind: str, statistic: str, name: str) -> float | None:
        """One number; None where it was not measured. NaN and Inf are counted only where there are any."""
        return self.values.get(Tag(kind, statistic, name))

    def column(self, kind: str, statistic: str) -> Mapping[str, float]:
        """One statistic of every site of a kind: name to value, in the order of execution."""
        if isinstance(self.values, Numbers):
            return self.values.column(kind, statistic)
        return self._columns.get((kind, statistic), {})

    def has(self, kind: str, statistic: str) -> bool:
        """Whether one statistic of any site of a kind is known."""
        if isinstance(self.values, Numbers):
            return self.values.has(kind, statistic)
        return bool(self.column(kind, statistic))

    @functools.cached_property
    def with_gradient(self) -> frozenset[str]:
        """Names of the parameters whose gradient is not zero in whole."""
        statistics = ("abs_max", "nan_count", "inf_count")
        if isinstance(self.values, Numbers):
            return frozenset(self.values.above_zero("gradients", statistics))
        columns = (self.column("gradients", statistic) for statistic in statistics)
        return frozenset(name for column in columns for name, value in column.items() if value > 0)

    @functools.cached_property
    def ratios(self) -> tuple[tuple[str, ...], FloatArray]:
        """Names of the matrices of which a ratio of the update is known, equal ones in one tuple, and the ratios."""
        column = self.column("updates", LOG10_RATIO)
        return _shared(tuple(column)), np.array(list(column.values()), np.float64)

    @property
    def vectors(self) -> frozenset[str]:
        """Names of the parameters that are no matrices: biases, scales of normalisations."""
        return _sorts_of(self.parameters).vectors

    @property
    def asking(self) -> tuple[str, ...]:
        """Names of the parameters that ask for a gradient."""
        return _sorts_of(self.parameters).asking

    def derived(self) -> dict[Tag, float]:
        """The numbers that the statistics of no single tensor tell; see `DERIVED`."""
        values = self.values.further() if isinstance(self.values, Numbers) else self.values
        return {tag: value for tag, value in values.items() if tag.statistic in DERIVED}

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether no tensor holds NaN or Inf."""
        if isinstance(self.values, Numbers):
            return not self.values.is_spoilt
        return not any(value for tag, value in self.values.items() if tag.statistic in COUNTS)

    def sizes(self, kind: str, statistic: str, names: tuple[str, ...]) -> FloatArray:
        """One statistic of some sites of a kind, of shape (names,); zero where it was not measured."""
        if isinstance(self.values, Numbers):
            return self.values.sizes(kind, statistic, names)
        column = self.column(kind, statistic)
        return np.array([column.get(name, 0.0) for name in names], np.float64)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Everything that was measured, in the order of execution."""
        found = dict.fromkeys(Site(tag.kind, tag.name) for tag in self.values if tag.statistic not in DERIVED)
        return tuple(found)

    @property
    def is_skipped(self) -> bool:
        """Whether a gradient scaler had the optimizer skip the step."""
        return bool(self.values.get(SKIPPED))

    @functools.cached_property
    def _columns(self) -> dict[tuple[str, str | None], dict[str, float]]:
        columns: dict[tuple[str, str | None], dict[str, float]] = {}
        for (kind, statistic, name), value in self.values.items():
            columns.setdefault((kind, statistic), {})[name] = value
        return columns


@functools.lru_cache(maxsize=1 << 16)
def _parsed(tag: str) -> Tag:
    """Kind and name of a histogram tag."""
    parsed = parse_tag(tag)
    assert parsed is not None
    return parsed


_Asked = TypeVar("_Asked")
_Told = TypeVar("_Told")


def _remembering(function: Callable[[_Asked], _Told]) -> Callable[[_Asked], _Told]:
    """The function, with what it gave for the last object it was asked about: most records share theirs."""
    last: tuple[_Asked, _Told] | None = None

    @functools.wraps(function)
    def remembered(asked: _Asked) -> _Told:
        nonlocal last
        known = last  # another thread may ask at the same time
        if known is None or known[0] is not asked:
            known = last = asked, function(asked)
        return known[1]

    return remembered


@_remembering
def _about(traits: Mapping[str, Traits]) -> tuple[dict[str, ParameterTraits], list[str]]:
    """What parameters are, and the tags of narrow types."""
    parameters, narrow = {}, []
    for tag, found in traits.items():
        kind, _, name = _parsed(tag)
        if kind == "parameters":
            parameters[name] = ParameterTraits(found.ndim, found.requires_grad)
        if _is_narrow(found.dtype):
            narrow.append(tag)
    return parameters, narrow


class _Sorts(NamedTuple):
    """What sorts of parameters there are."""

    vectors: frozenset[str]
    asking: tuple[str, ...]


@_remembering
def _sorts_of(parameters: Mapping[str, ParameterTraits]) -> _Sorts:
    """The sorts of parameters."""
    return _Sorts(
        frozenset([name for name, traits in parameters.items() if traits.ndim < _MATRIX]),
        tuple([name for name, traits in parameters.items() if traits.requires_grad]),
    )


@functools.cache
def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).max < _NARROW_MAX


def _of_narrow(kind: str, name: str, sketch: Sketch, traits: Traits) -> dict[Tag, float]:
    if not sketch.count:
        return {}
    info = torch.finfo(traits.dtype)
    nonzero = sketch.count - sketch.zero_count
    small = count_below(sketch.finite(), info.tiny / float(traits.scale)) / nonzero if nonzero else 0.0
    found = {Tag(kind, SUBNORMAL_FRACTION, name): small}
    if traits.dtype is torch.float16:  # float8 is scaled to fill its range
        found[Tag(kind, RANGE_FRACTION, name)] = sketch.abs_max * float(traits.scale) / info.max
    return found


def _ratios(numbers: Numbers, known: Mapping[str, ParameterTraits]) -> dict[Tag, float]:
    """Of each matrix log10 of the size of its update over its own, where neither is zero."""
    names = tuple(
        [
            name
            for name in numbers.column("updates", "rms")
            if (traits := known.get(name)) is not None and traits.ndim >= _MATRIX
        ]
    )
    if not names:
        return {}
    changes, sizes = numbers.sizes("updates", "rms", names), numbers.sizes("parameters", "rms", names)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log10(changes / sizes)
    are_told = (changes > 0.0) & (sizes > 0.0)
    return dict(itertools.compress(zip(_ratio_tags(names), ratios.tolist(), strict=True), are_told.tolist()))


@functools.lru_cache(maxsize=16)
def _ratio_tags(names: tuple[str, ...]) -> list[Tag]:
    """Tags of the ratios of these parameters; the same come again each step."""
    return [Tag("updates", LOG10_RATIO, name) for name in names]


@functools.lru_cache(maxsize=64)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for all that are equal."""
    return names
