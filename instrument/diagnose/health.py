"""The health table: one row a layer, with what a person looks at first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instrument.capture.names import MODULE_KINDS
from instrument.diagnose.diagnostics.units import BOUNDED
from instrument.diagnose.diagnostics.words import is_root, percent
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import LOG10_RATIO, Reading
from instrument.diagnose.units import UnitStatus

__all__ = ["HEADINGS", "SPARED", "TEXTS", "HealthRow", "health_rows"]

HEADINGS = ("layer", "units", "dead", "fires below", "saturated", "act. rms", "grad. rms", "log10 upd.", "flags")
TEXTS = ("layer", "flags")
SPARED = {"fires below": 6, "units": 5, "saturated": 4, "log10 upd.": 3, "grad. rms": 2, "act. rms": 1}
"""What a narrow terminal hides, that with the highest number first."""

FINE = "OK"
PASSES_NAN = "WARN passes on NaN"

_RECENT = 8
"""Readings that are looked at: the newest may lack activations, as the one at the end of a training does."""


@dataclasses.dataclass(frozen=True)
class HealthRow:
    """One layer of the table; what was not measured is None."""

    layer: str
    units: int | None
    dead_fraction: float | None
    rate_bound: float | None
    """A dead unit fires on fewer than this share of all samples, with 95 % confidence: 3 / n, the rule of three."""
    saturated_fraction: float | None
    """Of nonlinearities that are flat at both ends; a ReLU that is flat on most samples is sparse, not saturated."""
    activation_rms: float | None
    gradient_rms: float | None
    """Of the weight, or of the first parameter of the layer."""
    log10_ratio: float | None
    """Of the update of the same parameter over the parameter."""
    flags: tuple[str, ...]
    """"OK", or level and name of each finding of the layer, such as "CRIT dead_units"."""

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        values = dataclasses.asdict(self)
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        return {**finite, "flags": list(self.flags)}

    def cells(self) -> tuple[str, ...]:
        """The row as texts, in the order of `HEADINGS`."""
        return (
            self.layer,
            "" if self.units is None else str(self.units),
            "" if self.dead_fraction is None else percent(self.dead_fraction),
            "" if self.rate_bound is None else percent(self.rate_bound),
            "" if self.saturated_fraction is None else percent(self.saturated_fraction),
            _number(self.activation_rms),
            _number(self.gradient_rms),
            "" if self.log10_ratio is None else f"{self.log10_ratio:.1f}",
            ", ".join(self.flags),
        )

    @property
    def level(self) -> Level | None:
        """The worst level of its flags; None where all is well."""
        return max((Level[flag.split()[0]] for flag in self.flags if flag != FINE), default=None)


def health_rows(
    readings: Sequence[Reading], units: Mapping[str, UnitStatus], findings: Iterable[Finding]
) -> tuple[HealthRow, ...]:
    """Make the table.

    Args:
        readings: The last readings, oldest first; of each number the newest counts.
        units: The state of the units of each module.
        findings: What the newest reading suffers from.

    Returns:
        A row for each module that has parameters of its own or units that are judged, that holds no other module, or
        that a finding is about; in the order of execution.
    """
    recent = readings[-_RECENT:]
    outputs = _newest(recent, "activations", "rms")
    activations: dict[str, float] = {}
    for output, size in outputs.items():
        activations.setdefault(output.partition("[")[0], size)  # of several outputs the first
    gradients = _newest([reading for reading in recent if not reading.is_skipped], "gradients", "rms")
    ratios = _newest(recent, "updates", LOG10_RATIO)
    root = next((name for name in reversed(activations) if is_root(name)), "(model)")
    owned: dict[str, list[str]] = {}
    for name in {**_newest(recent, "parameters", "rms"), **gradients}:
        owned.setdefault(_owner(name) or root, []).append(name)
    flags: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.site is not None:
            kind, name = finding.site
            layer = name.partition("[")[0] if kind in MODULE_KINDS else _owner(name) or root
            flags.setdefault(layer, []).append(finding)
    modules = dict.fromkeys([*activations, *owned, *units, *flags])
    parents = {name[:cut] for name in modules for cut in range(len(name)) if name[cut] == "."}
    if len(modules) > 1:
        parents.add(root)
    return tuple(
        _row(name, owned.get(name, []), units.get(name), flags.get(name, []), activations, gradients, ratios)
        for name in modules
        if name not in parents or name in owned or name in units or name in flags
    )


def _row(
    name: str,
    parameters: Sequence[str],
    status: UnitStatus | None,
    findings: Iterable[Finding],
    activations: Mapping[str, float],
    gradients: Mapping[str, float],
    ratios: Mapping[str, float],
) -> HealthRow:
    main = next((own for own in parameters if own.endswith("weight")), parameters[0] if parameters else "")
    judged = status if status is not None and status.units and status.verdict in ("ok", "dead") else None
    worst = sorted({(-finding.level, finding.diagnostic) for finding in findings})
    numbers = (activations.get(name), gradients.get(main))
    fine = PASSES_NAN if any(number is not None and math.isnan(number) for number in numbers) else FINE
    return HealthRow(
        layer=name,
        units=status.units if status is not None else None,
        dead_fraction=len(judged.dead) / judged.units if judged is not None else None,
        rate_bound=judged.rate_bound if judged is not None else None,
        saturated_fraction=_mean(judged.saturated) if judged is not None and judged.function in BOUNDED else None,
        activation_rms=numbers[0],
        gradient_rms=numbers[1],
        log10_ratio=ratios.get(main),
        flags=tuple(f"{Level(-level)} {diagnostic}" for level, diagnostic in worst) or (fine,),
    )


def _newest(readings: Sequence[Reading], kind: str, statistic: str) -> dict[str, float]:
    """The newest value of each site, in the order of execution; NaN where some are NaN, or nothing is finite."""
    found: dict[str, float] = {}
    columns = [reading.column(kind, statistic) for reading in readings]
    for number, (reading, column) in enumerate(zip(readings, columns, strict=True), 1):
        if number < len(columns) and reading.is_finite and list(column) == list(columns[number]):
            continue  # all of it is in the one behind
        found.update(column.items())
        if statistic == "rms":
            # That of the finite values alone would be a healthy number beside a gradient that is NaN but for zeros.
            found.update((name, math.nan) for name, count in reading.column(kind, "nan_count").items() if count)
            infinite = reading.column(kind, "inf_count")
            found.update((name, math.nan) for name in infinite if reading.get(kind, statistic, name) is None)
    return found


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _mean(shares: Sequence[float]) -> float | None:
    return math.fsum(shares) / len(shares) if shares else None
