"""Rows of gradients that are zero, tallied for the units behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from instrument.capture.names import Site
from instrument.measure.batch import Column
from instrument.measure.groups import GROUP
from instrument.record.buffer import Buffer
from instrument.torch_private import Unseen
from instrument.watcher.notices import Notices
from instrument.watcher.units import UnitJudge

__all__ = ["RowTallies"]


class RowTallies:
    """Adds what rows of gradients tell of units to the step that is collected.

    Their samples are those that the module itself was seen to return, else those of the model's first output; where
    neither was seen the step counts as one sample, which says less than there was.

    Args:
        judge: Knows whose rows tell something.
        buffer: Where tallies are added.
        notices: Told of faults.
    """

    def __init__(self, judge: UnitJudge, buffer: Buffer, notices: Notices) -> None:
        self._judge = judge
        self._buffer = buffer
        self._notices = notices

    def add(
        self, found: Sequence[tuple[Site, torch.Tensor]], column: Column | None, otherwise: int, first: int = 0
    ) -> None:
        """Tally the rows of gradients; those of small ones that were measured together by one call for each group.

        Args:
            found: Site and gradient.
            column: Where they were measured, in their order; None where parts of them were.
            otherwise: Samples of the step where the module behind a gradient tells of none.
            first: The place of the first of them in the column.
        """
        groups: dict[int, tuple[list[str], list[int], list[int], list[int]]] = {}
        with Unseen():
            for place, (site, gradient) in enumerate(found, first):
                try:
                    module = self._judge.module_of_rows(site.name)
                    if module is None or not gradient.dim():
                        continue
                    samples = self._buffer.samples_of(module) or otherwise
                    item = column.items[place] if column is not None and self._judge.are_rows_first(module) else None
                    if isinstance(item, int):
                        names, places, rows, of = groups.setdefault(item // GROUP, ([], [], [], []))
                        names.append(site.name)
                        places.append(item % GROUP)
                        rows.append(len(gradient))
                        of.append(samples)
                    elif (tally := self._judge.rows(site.name, gradient, samples)) is not None:
                        self._buffer.add_units(site.name, tally)
                except Exception as error:
                    self._notices.failed(f"units of {site.name}", error)
        for number, (names, places, rows, of) in groups.items():
            assert column is not None
            start = column.groups[number].rows(places, rows, of)
            if start is not None:
                self._buffer.add_units_of(names, column.groups[number], start)
