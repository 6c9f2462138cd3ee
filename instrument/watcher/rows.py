"""Rows of gradients that are zero, tallied for the units behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from instrument.capture.names import Site
from instrument.errors import UnmeasurableError
from instrument.measure.batch import Column
from instrument.measure.device import Devices
from instrument.measure.small import GROUP
from instrument.measure.units import rows_together
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
        devices: What tallies of gradients on other devices travel to the host with.
    """

    def __init__(self, judge: UnitJudge, buffer: Buffer, notices: Notices, devices: Devices) -> None:
        self._judge = judge
        self._buffer = buffer
        self._notices = notices
        self._devices = devices
        self._known: tuple[tuple[int, int, int], list[Site], list[tuple[int, str, bool]]] | None = None

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
        away: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[torch.Tensor], list[int]]] = {}
        plan = self._planned([site for site, _ in found])
        every = self._buffer.samples_of([module for _, module, _ in plan])
        with Unseen():
            for (place, _, is_first), samples in zip(plan, every, strict=True):
                site, gradient = found[place]
                try:
                    if gradient.dim() < 2:  # a flat shard, whose elements are no rows
                        continue
                    item = column.items[first + place] if column is not None and is_first else None
                    if isinstance(item, int):
                        known = groups.get(item // GROUP)
                        if known is None:
                            known = groups[item // GROUP] = [], [], [], []
                        names, places, rows, of = known
                        names.append(site.name)
                        places.append(item % GROUP)
                        rows.append(gradient.size(0))  # `len` is a function of Python, twice as dear
                        of.append(samples or otherwise)
                    elif is_first and self._devices.can_find_rows(gradient):
                        names, gradients, of = away.setdefault((gradient.device, gradient.dtype), ([], [], []))
                        names.append(site.name)
                        gradients.append(gradient)
                        of.append(samples or otherwise)
                    elif (tally := self._judge.rows(site.name, gradient, samples or otherwise)) is not None:
                        self._buffer.add_units(site.name, tally)
                except Exception as error:
                    self._notices.failed(f"units of {site.name}", error)
            for names, gradients, of in away.values():
                try:
                    tallies = rows_together(gradients, of, self._devices)
                except UnmeasurableError:  # the next step goes another way, or a graph is captured, which is said
                    continue
                except Exception as error:
                    self._notices.failed(f"units of {names[0]} and others", error)
                    continue
                for name, tally in zip(names, tallies, strict=True):
                    self._buffer.add_units(name, tally)
        for number, (names, places, rows, of) in groups.items():
            assert column is not None
            start = column.groups[number].rows(places, rows, of)
            if start is not None:
                self._buffer.add_units_of(names, column.groups[number], start)

    def _planned(self, sites: list[Site]) -> list[tuple[int, str, bool]]:
        """Of gradients whose rows tell something the place, the module, and whether units are the first dimension.

        The same come again each step, and are looked up once.
        """
        age = (*self._judge.age, self._notices.faults)
        if self._known is None or self._known[0] != age or self._known[1] != sites:
            plan = [
                (place, module, self._judge.are_rows_first(module))
                for place, site in enumerate(sites)
                if (module := self._judge.module_of_rows(site.name)) is not None
            ]
            self._known = age, sites, plan
        return self._known[2]
