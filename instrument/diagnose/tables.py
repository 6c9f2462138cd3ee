"""Tables that fit the terminal: names are folded, and what still has no room is hidden and said to be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "FittedTable"]

_GAP = 3
"""Characters between two columns: their padding and the seam of the box."""

_EDGES = 2

_LEAST_TEXT = 12
"""Characters into which a column of texts is folded at the narrowest."""


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    is_text: bool = False
    """Texts stand on the left and are folded where room is scarce; numbers stand on the right and are never cut."""
    rank: int = 0
    """Where room is scarce the column with the highest rank is hidden first; one with rank 0 never is."""


class FittedTable:
    """A table for `rich` consoles that knows what to give up on a narrow one.

    Args:
        columns: What it has; those in which nothing stands are left out.
        rows: Cells, one for each column, and the style of the row.
        title: What stands above it.
        title_style: In which style.
        elsewhere: Where hidden columns can be seen.

    Example:
        >>> import io
        >>> columns = Column("layer", is_text=True), Column("rms"), Column("step", rank=1)
        >>> table = FittedTable(columns, [(("encoder.blocks.0", "0.25", "100"), "")])
        >>> console = Console(file=io.StringIO(), width=23)
        >>> console.print(table)
        >>> lines = console.file.getvalue().splitlines()
        >>> [line.rstrip() for line in lines if line.strip() and line[1] != "─"]
        [' layer           rms', ' encoder.       0.25', ' blocks.0', 'hidden for want of', 'room: step']
    """

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[tuple[Sequence[str], str]],
        title: str | None = None,
        title_style: str = "",
        elsewhere: str | None = None,
    ) -> None:
        self._columns = columns
        self._rows = rows
        self._title = title
        self._title_style = title_style
        self._elsewhere = elsewhere

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for a width."""
        filled = [number for number in range(len(self._columns)) if any(cells[number] for cells, _ in self._rows)]
        shown = self._shown(filled, options.max_width)
        widths = self._widths(shown, options.max_width)
        table = Table(
            title=self._title, title_justify="left", title_style=self._title_style, box=box.SIMPLE_HEAD, pad_edge=False
        )
        for number in shown:
            heading, is_text, _ = self._columns[number]
            table.add_column(
                heading, justify="left" if is_text else "right", overflow="fold", width=widths[number]
            )  # fmt: skip
        for cells, style in self._rows:
            texts = (Text(_folded(cells[number], widths[number])) for number in shown)  # a name is no markup
            table.add_row(*texts, style=style)
        yield table
        hidden = [self._columns[number].heading for number in filled if number not in shown]
        if hidden:
            more = f"; {self._elsewhere}" if self._elsewhere else ""
            yield Text(f"hidden for want of room: {', '.join(hidden)}{more}")

    def _shown(self, filled: Sequence[int], room: int) -> list[int]:
        """The columns that have room when each is as narrow as it can be."""
        shown = list(filled)
        while _total(map(self._least, shown)) > room:
            last = max(shown, key=lambda number: self._columns[number].rank)
            if not self._columns[last].rank:
                break
            shown.remove(last)
        return shown

    def _widths(self, shown: Sequence[int], room: int) -> dict[int, int]:
        """How wide each column is: as it would be, or narrowed where there is most to spare."""
        widths = {number: max(self._longest(number), len(self._columns[number].heading)) for number in shown}
        spare = {number: widths[number] - self._least(number) for number in shown}
        while _total(widths.values()) > room and any(spare.values()):
            widest = max(shown, key=lambda number: spare[number])
            widths[widest] -= 1
            spare[widest] -= 1
        return widths

    def _longest(self, number: int) -> int:
        return max((len(cells[number]) for cells, _ in self._rows), default=0)

    def _least(self, number: int) -> int:
        """The narrowest that a column can be: its numbers stay whole, its heading is folded between words."""
        heading, is_text, _ = self._columns[number]
        word = max(map(len, heading.split()), default=0)
        return max(word, min(self._longest(number), _LEAST_TEXT) if is_text else self._longest(number))


def _total(widths: Iterable[int]) -> int:
    """Characters that columns take with what is between and beside them."""
    known = list(widths)
    return sum(known) + _GAP * (len(known) - 1) + _EDGES


def _folded(text: str, width: int) -> str:
    """A dotted name, broken behind dots where it is too long; any other text as it is."""
    if len(text) <= width or " " in text:
        return text
    lines = [""]
    for part in re.findall(r"[^.]*\.?", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        while len(part) > width:
            lines[-1], part = part[:width], part[width:]
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
