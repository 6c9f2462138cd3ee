"""The report: the last value of each statistic, kind by kind and name by name.

It is made of scalars, tag by tag and step by step, which a live watch has in its history and a finished run in
its event files; so both show the same.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from instrument.config import SECTIONS
from instrument.record.buffer import StepRecord
from instrument.record.reading import Scalars, read_scalars
from instrument.record.tags import COUNTS, STATISTICS, Tag, parse_tag

__all__ = ["Report", "Row"]

COLUMNS = (*STATISTICS, *COUNTS)
_HEADINGS = {
    "rms": "rms",
    "mean": "mean",
    "std": "std",
    "abs_max": "abs max",
    "zero_fraction": "zeros",
    "nan_count": "NaN",
    "inf_count": "Inf",
}
TEXT_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Row:
    """The last values of one site."""

    kind: str
    name: str
    step: int
    """Step of the values; NaN and Inf counts may be of an earlier one."""
    values: Mapping[str, float]
    """Statistic to value; a statistic that does not apply is absent."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Last values of a watch, with what could not be observed; printing it gives tables.

    Example:
        >>> print(Report((), ()))
        nothing has been recorded yet
    """

    rows: tuple[Row, ...]
    notices: tuple[str, ...]

    @classmethod
    def of_records(cls, records: Iterable[StepRecord], notices: Iterable[str] = ()) -> Report:
        """Report on step records, such as a watch's history."""
        scalars: Scalars = {}
        for record in records:
            for tag, sketch in record.items():
                parsed = parse_tag(tag)
                assert parsed is not None
                numbers = {**STATISTICS, **COUNTS} if sketch.count else COUNTS
                for statistic, compute in numbers.items():
                    scalars.setdefault(Tag(parsed.kind, statistic, parsed.name), {})[record.step] = compute(sketch)
        return cls(_rows(scalars), tuple(notices))

    @classmethod
    def of_run(cls, logdir: Path, progress: Callable[[int], None] | None = None) -> Report:
        """Report on the event files of a run.

        Args:
            logdir: Directory of event files.
            progress: Called with the number of bytes read since the last call.

        Raises:
            RunError: They cannot be read, or hold nothing of ours.
        """
        return cls(_rows(read_scalars(logdir, progress)), ())

    def as_dict(self) -> dict[str, Any]:
        """The same for programs: ``{"rows": [{"kind", "name", "step", statistic: value, ...}], "notices": []}``."""
        rows = [{"kind": row.kind, "name": row.name, "step": row.step, **_finite(row.values)} for row in self.rows]
        return {"rows": rows, "notices": list(self.notices)}

    def tables(self) -> list[Table]:
        """One table a kind, for `rich` consoles."""
        tables = []
        for kind, section in SECTIONS.items():
            rows = [row for row in self.rows if row.kind == kind]
            if not rows:
                continue
            table = Table(title=section, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("name", overflow="fold", no_wrap=False)
            for statistic in COLUMNS:
                table.add_column(_HEADINGS[statistic], justify="right", no_wrap=True)
            table.add_column("step", justify="right", no_wrap=True)
            for row in rows:
                cells = [_cell(statistic, row.values.get(statistic)) for statistic in COLUMNS]
                style = "bold red" if row.values.get("nan_count") or row.values.get("inf_count") else ""
                table.add_row(row.name, *cells, str(row.step), style=style)
            tables.append(table)
        return tables

    def print_to(self, console: Console) -> None:
        """Print the tables and the notices."""
        if not self.rows:
            console.print("nothing has been recorded yet")
        for table in self.tables():
            console.print(table)
        if self.notices:
            console.print("Not observed", style="bold")
            for notice in self.notices:
                console.print(f"  {notice}", markup=False, highlight=False)

    def markdown(self) -> str:
        """The tables as Markdown, for TensorBoard's TEXT."""
        parts = []
        for kind, section in SECTIONS.items():
            rows = [row for row in self.rows if row.kind == kind]
            if rows:
                headings = ["name", *(_HEADINGS[statistic] for statistic in COLUMNS), "step"]
                lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
                for row in rows:
                    cells = (_cell(statistic, row.values.get(statistic)) for statistic in COLUMNS)
                    lines.append(" | ".join((f"`{row.name}`", *cells, str(row.step))))
                parts.append(f"**{section}**\n\n" + "\n".join(lines))
        parts += [f"Not observed: {notice}" for notice in self.notices]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return _rendered(self, html=False)

    def _repr_html_(self) -> str:
        return _rendered(self, html=True)


def _rows(scalars: Scalars) -> tuple[Row, ...]:
    """One row a site, in the order of kinds and of first appearance."""
    last: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for tag, values in scalars.items():
        if tag.statistic in COLUMNS:
            step = max(values)
            last.setdefault((tag.kind, tag.name), {})[tag.statistic] = (step, values[step])
    order = {kind: number for number, kind in enumerate(SECTIONS)}
    return tuple(
        Row(kind, name, max(step for step, _ in found.values()), {key: value for key, (_, value) in found.items()})
        for (kind, name), found in sorted(last.items(), key=lambda item: order[item[0][0]])
    )


def _cell(statistic: str, value: float | None) -> str:
    if value is None:
        return "0" if statistic in COUNTS else ""
    if statistic in COUNTS:
        return f"{value:.0f}"
    if statistic == "zero_fraction":
        return f"{100 * value:.1f} %"
    return f"{value:.3g}"


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN and no Inf."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _rendered(report: Report, html: bool) -> str:
    console = Console(file=io.StringIO(), width=TEXT_WIDTH, record=html, color_system="truecolor" if html else None)
    report.print_to(console)
    if html:
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")
