"""The report: the health of each layer, what was found, what came before an accident, and what was not observed.

A live watch has all of it in memory and a finished run in its event files; both go through the same doctor, so both
show the same.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.details import Latest, Row, detail_tables
from instrument.diagnose.doctor import Doctor
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.flight import Accident, Growth, grew_first, read_flight
from instrument.diagnose.health import HEADINGS, SPARED, TEXTS, HealthRow, health_rows
from instrument.diagnose.readings import NO_PARAMETERS, ParameterTraits, Reading
from instrument.diagnose.tables import Column, FittedTable
from instrument.diagnose.units import decode
from instrument.errors import RunError
from instrument.record.buffer import StepRecord
from instrument.record.documents import UNITS_TAG, WATCH_TAG, unpacked
from instrument.record.reading import read_steps

__all__ = ["Report", "health_markdown"]

TEXT_WIDTH = 120
GROWTHS_SHOWN = 5
SAME_SHOWN = 4
"""Findings of one diagnostic and level that are printed in full."""

_STYLES = {Level.INFO: "cyan", Level.WARN: "bold yellow", Level.CRIT: "bold red"}


@dataclasses.dataclass(frozen=True)
class Report:
    """The state of a watch; printing it gives tables.

    Example:
        >>> print(Report())
        nothing has been recorded yet
    """

    health: tuple[HealthRow, ...] = ()
    """One row a layer."""
    findings: tuple[Finding, ...] = ()
    """Everything found, oldest first."""
    notices: tuple[str, ...] = ()
    """What could not be observed, and why."""
    accident: Accident | None = None
    """What the flight recorder was written for."""
    growths: tuple[Growth, ...] = ()
    """Which tensors grew before the accident, the first in front."""
    rows: tuple[Row, ...] = ()
    """The last values of each site."""

    @classmethod
    def of_watch(
        cls,
        doctor: Doctor,
        records: Iterable[StepRecord],
        notices: Iterable[str] = (),
        accident: Accident | None = None,
    ) -> Report:
        """Report on a live watch.

        Args:
            doctor: Who examined its records.
            records: Its history.
            notices: What it could not observe.
            accident: What its flight recorder was written for.
        """
        latest = Latest()
        latest.add_records(records)
        findings, readings = doctor.findings(), tuple(doctor.readings)
        return cls(
            health_rows(readings, doctor.units(), doctor.active()),
            findings,
            tuple(notices),
            accident,
            tuple(grew_first(readings, accident.step)) if accident is not None else (),
            latest.rows(),
        )

    @classmethod
    def of_run(
        cls, logdir: Path, progress: Callable[[int], None] | None = None, damages: list[str] | None = None
    ) -> Report:
        """Report on the event files of a run, as far as they are whole.

        Args:
            logdir: Directory of event files.
            progress: Called with the number of bytes read since the last call.
            damages: What files are torn or damaged, and where, is added here; it stands in the notices too.

        Raises:
            RunError: They cannot be read, or hold nothing of ours.
        """
        latest = Latest()
        doctor: Doctor | None = None
        notices: tuple[str, ...] = ()
        parameters = NO_PARAMETERS
        damages = damages if damages is not None else []
        for contents in read_steps(logdir, progress, damages):
            about = None
            if WATCH_TAG in contents.documents:
                about = unpacked(contents.documents[WATCH_TAG])
                notices = tuple(about["notices"])
                parameters = {name: ParameterTraits(*traits) for name, traits in about["parameters"].items()}
            if doctor is None:
                doctor = Doctor(_config_of(about["config"]) if about is not None else Config(), None)
            units = decode(contents.documents[UNITS_TAG]) if UNITS_TAG in contents.documents else {}
            doctor.examine(Reading.of_scalars(contents.step, contents.scalars, units, contents.loss, parameters))
            latest.add(contents.step, contents.scalars)
        assert doctor is not None
        try:
            accident, before = read_flight(logdir) or (None, [])
        except RunError as error:
            accident, before = None, []
            damages.append(str(error))
        return cls(
            health_rows(tuple(doctor.readings), doctor.units(), doctor.active()),
            doctor.findings(),
            (*notices, *damages),
            accident,
            tuple(grew_first(before, accident.step)) if accident is not None else (),
            latest.rows(),
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for programs: ``health``, ``findings``, ``accident``, ``growths``, ``notices`` and ``rows``."""
        return {
            "health": [row.as_dict() for row in self.health],
            "findings": [finding.as_dict() for finding in self.findings],
            "accident": self.accident.as_dict() if self.accident is not None else None,
            "growths": [growth.as_dict() for growth in self.growths],
            "notices": list(self.notices),
            "rows": [row.as_dict() for row in self.rows],
        }

    def print_to(self, console: Console, full: bool = False) -> None:
        """Print the tables.

        Args:
            console: Where to.
            full: Whether the last value of each statistic is printed too.
        """
        if not self.health and not self.rows:
            console.print("nothing has been recorded yet")
        if self.health:
            console.print(_health_table(self.health))
        if self.rows:
            self._print_findings(console)
        if self.accident is not None:
            self._print_accident(console)
        if full:
            for table in detail_tables(self.rows):
                console.print(table)
        if self.notices:
            console.print("Not observed", style="bold")
            for notice in self.notices:
                console.print(f"  {notice}", markup=False, highlight=False)

    def _print_findings(self, console: Console) -> None:
        console.print("Findings", style="bold")
        if not self.findings:
            console.print("  none: nothing looks wrong")
        worst: dict[tuple[str, Site | None], Finding] = {}
        since: dict[tuple[str, Site | None], int] = {}
        for finding in self.findings:
            what = finding.diagnostic, finding.site
            since.setdefault(what, finding.step)
            if what not in worst or finding.level >= worst[what].level:
                worst[what] = finding
        total = Counter((finding.level, finding.diagnostic) for finding in worst.values())
        shown: Counter[tuple[Level, str]] = Counter()
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in sorted(worst.values(), key=lambda finding: (-finding.level, finding.step)):
            key = finding.level, finding.diagnostic
            shown[key] += 1
            level = Text(f"  {finding.level}", style=_STYLES[finding.level])
            if shown[key] <= SAME_SHOWN:
                first = since[finding.diagnostic, finding.site]
                place = [finding.site.name] if finding.site is not None else []
                place += [f"since step {first}"] if first < finding.step else []
                where = Text(", ".join(place) + ": " * bool(place), style="bold")
                table.add_row(level, f"step {finding.step}", where.append(Text(finding.sentence, style="not bold")))
            if shown[key] == SAME_SHOWN < total[key]:
                table.add_row(
                    level, "", f"and {total[key] - SAME_SHOWN} more {finding.diagnostic}; --json has them all"
                )
        console.print(table)
        console.print()

    def _print_accident(self, console: Console) -> None:
        assert self.accident is not None
        console.print(f"Before the accident at step {self.accident.step} ({self.accident.reason})", style="bold")
        if not self.growths:
            console.print("  no tensor had grown tenfold: it came from one sampled step to the next\n")
            return
        steps = sorted({step for growth in self.growths[:GROWTHS_SHOWN] for step, _ in growth.values})
        columns = (
            Column("grew first", is_text=True),
            Column("since step", rank=1),
            *(Column(f"step {step}", rank=len(steps) - number + 1) for number, step in enumerate(steps)),
        )
        rows = []
        for growth in self.growths[:GROWTHS_SHOWN]:
            values = dict(growth.values)
            sizes = (f"{values[step]:.3g}" if step in values else "" for step in steps)
            rows.append(((f"{growth.site.kind} {growth.site.name}", str(growth.step), *sizes), ""))
        title = "  largest magnitudes, step by step"
        console.print(FittedTable(columns, rows, title, "italic", "--json has all"))

    def __str__(self) -> str:
        return _rendered(self, html=False)

    def _repr_html_(self) -> str:
        return _rendered(self, html=True)


def _config_of(values: dict[str, Any]) -> Config:
    """The settings of a run; keys of another version are passed over."""
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{key: value for key, value in values.items() if key in known})


def _health_table(rows: Sequence[HealthRow]) -> FittedTable:
    columns = [Column(heading, heading in TEXTS, SPARED.get(heading, 0)) for heading in HEADINGS]
    cells = [(row.cells(), _STYLES[row.level] if row.level is not None else "") for row in rows]
    return FittedTable(columns, cells, "Health", "bold", "--json has all")


def _filled(every: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which something stands."""
    return [number for number in range(len(HEADINGS)) if any(cells[number] for cells in every)]


def health_markdown(rows: Sequence[HealthRow], findings: Sequence[Finding], notices: Sequence[str]) -> str:
    """The health table, what is wrong now and what was not observed, for TensorBoard's TEXT.

    Args:
        rows: The table.
        findings: What the newest reading suffers from.
        notices: What could not be observed.

    Returns:
        Markdown.
    """
    every = [row.cells() for row in rows]
    filled = _filled(every)
    parts = []
    if rows:
        lines = [" | ".join(HEADINGS[number] for number in filled), " | ".join("---" for _ in filled)]
        for cells in every:
            lines.append(" | ".join([f"`{cells[0]}`", *(cells[number] for number in filled[1:])]))
        parts.append("\n".join(lines))
    if findings:
        worst = sorted(findings, key=lambda finding: -finding.level)
        parts.append("\n".join(f"* **{f.level}** `{f.site.name if f.site else 'network'}` {f.sentence}" for f in worst))
    else:
        parts.append("**OK** nothing looks wrong")
    parts += [f"Not observed: {notice}" for notice in notices]
    return "\n\n".join(parts)


def _rendered(report: Report, html: bool) -> str:
    console = Console(file=io.StringIO(), width=TEXT_WIDTH, record=html, color_system="truecolor" if html else None)
    report.print_to(console)
    if html:
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")
