"""Details: the last value of each statistic, kind by kind and name by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instrument.config import SECTIONS
from instrument.diagnose.tables import Column, FittedTable
from instrument.record.buffer import StepRecord
from instrument.record.statistics import COLUMNS
from instrument.record.tags import COUNTS, Tag, parse_tag

__all__ = ["COLUMNS", "Latest", "Row", "detail_tables"]

_HEADINGS = {
    "rms": "rms",
    "mean": "mean",
    "std": "std",
    "abs_max": "abs max",
    "zero_fraction": "zeros",
    "nan_count": "NaN",
    "inf_count": "Inf",
}
_SPARED = {"std": 3, "zero_fraction": 2, "mean": 1}
"""What a narrow terminal hides, that with the highest number first."""

_COLUMNS = (
    Column("name", is_text=True),
    *(Column(_HEADINGS[statistic], rank=_SPARED.get(statistic, 0)) for statistic in COLUMNS),
    Column("step", rank=4),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The last values of one site."""

    kind: str
    name: str
    step: int
    """Step of the values; NaN and Inf counts may be of an earlier one."""
    values: Mapping[str, float]
    """Statistic to value; a statistic that does not apply is absent."""

    def as_dict(self) -> dict[str, Any]:
        """The same for programs; JSON knows no NaN and no Inf."""
        values = {key: value if math.isfinite(value) else None for key, value in self.values.items()}
        return {"kind": self.kind, "name": self.name, "step": self.step, **values}


class Latest:
    """The newest value of each statistic, gathered step by step.

    Example:
        >>> latest = Latest()
        >>> latest.add(0, {Tag("gradients", "rms", "fc.weight"): 0.5})
        >>> latest.rows()[0].values["rms"]
        0.5
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}

    def add(self, step: int, scalars: Mapping[Tag, float]) -> None:
        """Take the scalars of a step, which is not before the last."""
        for kind, statistic, name in scalars:
            if statistic in COLUMNS:
                value = scalars[Tag(kind, statistic, name)]
                self._values.setdefault((kind, name), {})[statistic] = (step, value)

    def add_records(self, records: Iterable[StepRecord]) -> None:
        """Take step records, such as a watch's history."""
        for record in records:
            for (tag, sketch), values in zip(record.items(), record.statistics().tolist(), strict=True):
                parsed = parse_tag(tag)
                assert parsed is not None
                scalars = {
                    Tag(parsed.kind, statistic, parsed.name): value
                    for statistic, value in zip(COLUMNS, values, strict=True)
                    if sketch.count or statistic in COUNTS
                }
                self.add(record.step, scalars)

    def rows(self) -> tuple[Row, ...]:
        """One row a site, in the order of kinds and of first appearance."""
        order = {kind: number for number, kind in enumerate(SECTIONS)}
        return tuple(
            Row(kind, name, max(step for step, _ in found.values()), {key: value for key, (_, value) in found.items()})
            for (kind, name), found in sorted(self._values.items(), key=lambda item: order[item[0][0]])
        )


def detail_tables(rows: Sequence[Row]) -> list[FittedTable]:
    """One table a kind, for `rich` consoles."""
    tables = []
    for kind, section in SECTIONS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        rows_of_kind = [
            (
                (row.name, *(_cell(statistic, row.values.get(statistic)) for statistic in COLUMNS), str(row.step)),
                "bold red" if row.values.get("nan_count") or row.values.get("inf_count") else "",
            )
            for row in of_kind
        ]
        tables.append(FittedTable(_COLUMNS, rows_of_kind, section, elsewhere="--json has all"))
    return tables


def _cell(statistic: str, value: float | None) -> str:
    if value is None:
        return "0" if statistic in COUNTS else ""
    if statistic in COUNTS:
        return f"{value:.0f}"
    if statistic == "zero_fraction":
        return f"{100 * value:.1f} %"
    return f"{value:.3g}"
