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

    def add_all(self, found: Sequence[tuple[Site, torch.Tensor]], column: Column, otherwise: int) -> None:
        """Tally the rows of gradients; those of small ones that were measured together by one call for each group.

        Args:
            found: Site and gradient.
            column: Where they were measured, in their order.
            otherwise: Samples of the step where the module behind a gradient tells of none.
        """
        groups: dict[int, tuple[list[str], list[tuple[int, int, int]]]] = {}
        with Unseen():
            for place, (site, gradient) in enumerate(found):
                module = self._judge.module_of_rows(site.name)
                if module is None or not gradient.dim():
                    continue
                item, samples = column.items[place], self._buffer.samples_of(module) or otherwise
                if isinstance(item, int) and self._judge.are_rows_first(module):
                    names, wanted = groups.setdefault(item // GROUP, ([], []))
                    names.append(site.name)
                    wanted.append((item % GROUP, len(gradient), samples))
                else:
                    self._add(site.name, gradient, samples)
        for number, (names, wanted) in groups.items():
            group = column.groups[number]
            first = group.rows(wanted)
            if first is not None:
                self._buffer.add_units_of(names, group, first)

    def add(self, parameter: str, gradient: torch.Tensor, column: Column | None, otherwise: int) -> None:
        """Tally the rows of one gradient; call it under `Unseen`.

        Args:
            parameter: Name of the parameter.
            gradient: Its gradient.
            column: Where it was measured last of all; None where a part of it was.
            otherwise: As for `add_all`.
        """
        try:
            module = self._judge.module_of_rows(parameter)
            if module is None or not gradient.dim():
                return
            samples = self._buffer.samples_of(module) or otherwise
            item = column.items[-1] if column is not None and self._judge.are_rows_first(module) else None
            if column is not None and isinstance(item, int):
                group = column.groups[item // GROUP]
                number = group.rows([(item % GROUP, len(gradient), samples)])
                if number is not None:
                    self._buffer.add_units(parameter, group, number)
                return
        except Exception as error:
            self._notices.failed(f"units of {parameter}", error)
            return
        self._add(parameter, gradient, samples)

    def _add(self, parameter: str, gradient: torch.Tensor, samples: int) -> None:
        try:
            tally = self._judge.rows(parameter, gradient, samples)
        except Exception as error:
            self._notices.failed(f"units of {parameter}", error)
            return
        if tally is not None:
            self._buffer.add_units(parameter, tally)
