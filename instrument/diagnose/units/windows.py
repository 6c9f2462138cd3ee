"""Units over time: dead, constant, rare, always on, by windows of samples, with the bound that the evidence allows.

One batch decides badly: on a ReLU network in which 5.9 % of the units are dead, silence in one batch of 64 is right in
0.65 of its verdicts, silence over 4096 samples in 0.95 and more. So nothing is said of a unit until a whole *window*
has been seen (`dead_window_samples` and `dead_window_batches`, both), and beside every verdict stands what it is worth:
a unit that was silent on n samples fires, with 95 % confidence, on less than 3/n of them (the rule of three).
"""

from __future__ import annotations

from collections.abc import Collection

from instrument.config import Config
from instrument.diagnose.units.ranges import RangeWindow
from instrument.diagnose.units.rows import RowWindow
from instrument.diagnose.units.status import UnitStatus
from instrument.diagnose.units.window import Window
from instrument.errors import warn_quietly
from instrument.measure.units import UnitTally
from instrument.record.buffer import StepRecord
from instrument.record.tallies import Tallies

__all__ = ["UnitWindows"]


class UnitWindows:
    """Follows the units of all modules through the records of a run.

    Args:
        config: The settings: `dead_window_samples`, `dead_window_batches` and `saturated_fraction_crit`.

    Example:
        >>> import torch
        >>> from instrument.measure.slopes import slopes_named
        >>> from instrument.measure.units import tally_units
        >>> windows = UnitWindows(Config(dead_window_samples=8, dead_window_batches=2))
        >>> z = torch.tensor([[-1.0, 2.0]] * 4)
        >>> for step in range(2):
        ...     tally = tally_units(z, 1, slopes_named("relu"))
        ...     windows.add(StepRecord(step, {}, 0.0, units={"act": tally}))
        >>> windows.status()["act"].dead, windows.status()["act"].verdict
        ((0,), 'dead')
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._windows: dict[str, Window | RangeWindow | RowWindow] = {}
        self._order: dict[str, None] = {}
        self._left_out: set[str] = set()

    def add(self, record: StepRecord) -> None:
        """Add the tallies of one step.

        A module whose units or function have changed begins anew.

        Args:
            record: The record; steps must not fall.
        """
        self._order.update(dict.fromkeys(record.units))
        together = self._add_together(record)
        for name in [name for name in record.units if name not in together]:
            tally = self._tally(record, name)
            if tally is None:
                continue
            window = self._windows.get(name)
            if isinstance(window, (RangeWindow, RowWindow)):
                window = self._separate(window, (name,))[name]
            if window is None or (tally.samples and not tally.fits(window.pattern)):
                self._windows[name] = window = Window(tally, self._config)
            if tally.samples:
                window.add(record.step, tally)

    def _add_together(self, record: StepRecord) -> set[str]:
        """Add what stands side by side, of modules and gradients of which that was so on every step; their names."""
        added: set[str] = set()
        if not isinstance(record.units, Tallies):
            return added
        found = record.units.together()
        for names, ranges in found.ranges:
            window = self._windows.get(names[0])
            if not isinstance(window, RangeWindow) or not window.fits(names, ranges):
                for name in names:
                    if isinstance(known := self._windows.get(name), RangeWindow):
                        self._separate(known, names)
                if any(name in self._windows or name in self._left_out for name in names):
                    continue
                window = RangeWindow(names, ranges, self._config)
                self._windows.update(dict.fromkeys(names, window))
            window.add(record.step, ranges)
            added.update(names)
        for names, rows in found.rows:
            counts = dict(zip(names, rows.units.tolist(), strict=True))
            added.update(self._add_rows(record.step, counts, int(rows.samples[0])))
        return added

    def _add_rows(self, step: int, rows: dict[str, int], samples: int) -> Collection[str]:
        """Add gradients of which no row is zero, or of zeros alone, where samples are 0; those added."""
        usual = self._windows.get(next(iter(rows)))
        if isinstance(usual, RowWindow) and usual.rows == rows:
            if samples:
                usual.add(step, samples)
            return rows
        known: dict[RowWindow, dict[str, int]] = {}
        new = {}
        for name, count in rows.items():
            window = self._windows.get(name)
            if window is None and name not in self._left_out:
                new[name] = count
            elif isinstance(window, RowWindow):
                known.setdefault(window, {})[name] = count
        if new:
            window = RowWindow(new, self._config)
            self._windows.update(dict.fromkeys(new, window))
            known[window] = new
        if not samples:  # which says nothing, however each is followed
            return rows
        added: set[str] = set()
        for window, own in known.items():
            staying = {name for name, count in own.items() if window.rows[name] == count}
            others = window.rows.keys() - staying
            if len(others) > len(staying):
                self._separate(window, staying)
                continue
            self._separate(window, others)
            window.add(step, samples)
            added |= staying
        return added

    def _separate(self, together: RangeWindow | RowWindow, names: Collection[str]) -> dict[str, Window]:
        """Follow these one by one from now on, since they were not alike on a step; the windows of those that left."""
        alone = together.leave(names)
        self._windows.update(alone)
        return alone

    def _tally(self, record: StepRecord, name: str) -> UnitTally | None:
        """A tally of the record; None where making it has failed, which is told once and leaves these units out."""
        if name in self._left_out:
            return None
        try:
            return record.units[name]
        except Exception as error:
            self._left_out.add(name)
            warn_quietly(
                f"units of {name}: this library failed with {type(error).__name__}: {error}; left out from now on"
            )
            return None

    def judge(self) -> dict[str, UnitStatus]:
        """What is known of the units now; rates are of the steps from here on then."""
        found = self.status()
        for window in self._windows.values():
            if not isinstance(window, RangeWindow):
                window.is_judged = True
        return found

    def status(self) -> dict[str, UnitStatus]:
        """What is known of the units of each module, in the order in which they were first seen.

        Returns:
            Module name to status. Gradient rows go under the module that has the weight; where the range of its
            output is known besides, constant units come from that.
        """
        found: dict[str, UnitStatus] = {}
        windows = {name: self._windows[name] for name in self._order if name in self._windows}
        together: dict[str, UnitStatus] = {}
        rows: list[UnitStatus] = []
        for name, window in windows.items():
            if isinstance(window, Window):
                if window.pattern.witness == "activations":
                    found[name] = window.status(name)
                else:
                    rows.append(window.status(name.rpartition(".")[0]))
                continue
            if name not in together:
                together.update(window.statuses())
            if isinstance(window, RangeWindow):
                found[name] = together[name]
            else:
                rows.append(together[name])
        for status in rows:
            seen = found.get(status.name)
            if seen is None or (seen.function is None and status.verdict != "no-data"):
                found[status.name] = (
                    status.but(constant=seen.constant) if seen is not None and seen.constant else status
                )
        return found
