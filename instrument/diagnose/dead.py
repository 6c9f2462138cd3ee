"""The dead units of a run in words: which, since when, and what the evidence allows to say.

Silence over n samples leaves, with 95 % confidence, a rate of firing below 3/n (the rule of three: Hanley and
Lippman-Hand, 1983). That bound stands beside every verdict.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from instrument.capture.names import nearest_names
from instrument.capture.patterns import Pattern
from instrument.diagnose.figures import sheet
from instrument.diagnose.history import UnitHistory
from instrument.diagnose.tables import Column, FittedTable
from instrument.diagnose.units import UnitStatus
from instrument.errors import RunError, SelectionError

__all__ = ["DeadUnits", "LayerUnits", "bound_in_words"]

SHOWN_INDICES = 24
"""Indices of a layer that people are shown; programs get all."""

DEAD = "dead"

_COLUMNS = (
    Column("layer", is_text=True), Column("function", is_text=True, rank=3), Column("units", rank=1), Column("dead"),
    Column("rare", rank=2), Column("saturated", rank=4), Column("verdict", is_text=True),
)  # fmt: skip


def bound_in_words(rate_bound: float) -> str:
    """The bound that silence sets, in words.

    Args:
        rate_bound: 3/n, firings a sample.

    Returns:
        What a silent unit does at most.

    Example:
        >>> bound_in_words(3 / 4096)
        'less often than once in 1365 samples'
    """
    if not 0 < rate_bound < 1:
        return "any rate"
    return f"less often than once in {math.floor(1 / rate_bound + 1e-9)} samples"


@dataclasses.dataclass(frozen=True)
class LayerUnits:
    """The units of one layer, and since when those that are dead are silent."""

    status: UnitStatus
    since: dict[int, int]
    """Index of each dead unit to the first step of its silence, as far as that is known."""
    picture: Callable[[], Image.Image | None]

    def as_dict(self) -> dict[str, Any]:
        """The same for programs, with every index."""
        since = {str(unit): step for unit, step in self.since.items()}
        return {**self.status.as_dict(), "since": since, "bound": bound_in_words(self.status.rate_bound)}

    def sentence(self) -> str:
        """Which units are dead, since when, and how sure that is."""
        status = self.status
        steps = sorted(self.since.values())
        since = f"step {steps[0]}" if steps[0] == steps[-1] else f"steps {steps[0]} to {steps[-1]}"
        shown = ", ".join(map(str, status.dead[:SHOWN_INDICES]))
        hidden = len(status.dead) - SHOWN_INDICES
        units = f"units {shown}" if len(status.dead) > 1 else f"unit {shown}"
        more = f" and {hidden} more" if hidden > 0 else ""
        subject = "Each fires" if len(status.dead) > 1 else "It fires"
        return (
            f"{status.name}: {units}{more}. Silent since {since}. {subject} {bound_in_words(status.rate_bound)} "
            f"({status.samples} seen in {status.batches} batches, 95 % sure)."
        )


@dataclasses.dataclass(frozen=True)
class DeadUnits:
    """The units of the layers of a run; printing it gives a table, and a sentence for each layer with dead units."""

    layers: tuple[LayerUnits, ...]

    @classmethod
    def of_history(cls, history: UnitHistory, layer: str, run: str) -> DeadUnits:
        """Select layers from what is known of a run.

        Args:
            history: The run.
            layer: A glob over names of layers, or a regular expression behind ``re:``.
            run: What the run is called in messages.

        Returns:
            The layers that match.

        Raises:
            RunError: The run tells nothing of units.
            SelectionError: The glob matches no layer, with the nearest names.

        Example:
            >>> DeadUnits.of_history(UnitHistory(), "**", "runs/one")
            Traceback (most recent call last):
            ...
            instrument.errors.RunError: runs/one tells nothing of units: activations were not watched, or nothing was
            flushed yet
        """
        if not history.latest:
            raise RunError(f"{run} tells nothing of units: activations were not watched, or nothing was flushed yet")
        pattern = Pattern(layer)
        names = [name for name in history.latest if pattern.matches(name)]
        if not names:
            near = nearest_names(pattern.body, list(history.latest))
            raise SelectionError(f"--layer {layer!r} matches no layer with units{near}")
        return cls(
            tuple(
                LayerUnits(history.latest[name], history.since(name), functools.partial(history.picture, name))
                for name in names
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {"layers": [layer.as_dict() for layer in self.layers]}

    def table(self) -> FittedTable:
        """A row for each layer, for `rich` consoles."""
        rows = []
        for layer in self.layers:
            status = layer.status
            share = f" ({100 * len(status.dead) / status.units:.1f} %)" if status.dead else ""
            mean = f"{100 * sum(status.saturated) / len(status.saturated):.1f} %" if status.saturated else ""
            cells = (status.name, status.function or "", str(status.units), f"{len(status.dead)}{share}",
                     str(len(status.rare)), mean, status.verdict)  # fmt: skip
            rows.append((cells, "bold red" if status.verdict == DEAD else ""))
        return FittedTable(_COLUMNS, rows, elsewhere="--json has all")

    def print_to(self, console: Console) -> None:
        """Print the table and the sentences."""
        console.print(self.table())
        dead = [layer for layer in self.layers if layer.status.dead]
        for layer in dead:
            console.print(layer.sentence(), markup=False, highlight=False, soft_wrap=True)
        if not dead:
            watching = sum(layer.status.verdict in ("watching", "no-data") for layer in self.layers)
            undecided = f"; {watching} of {len(self.layers)} layers have too few samples to say" if watching else ""
            console.print(f"No unit is dead{undecided}.", markup=False, highlight=False)

    def save_png(self, path: Path) -> None:
        """Write the unit maps of all layers as one picture.

        Args:
            path: The file.

        Raises:
            RunError: Nothing is known of the rates of these units, or the file cannot be written.
        """
        pictures = [picture for layer in self.layers if (picture := layer.picture()) is not None]
        if not pictures:
            raise RunError(f"there is nothing to draw: no rates are known of {self.layers[0].status.name}")
        try:
            sheet(pictures).save(path, "PNG")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error}") from error
