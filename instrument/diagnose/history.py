"""What became of the units of each module through a run: since when they are dead, and a picture of all of it.

Statuses come one flush after another, from a live watch or from the event files of a run. What is kept is bounded: at
most 512 columns of a byte a unit, and fewer where a layer is wide; a longer run gets columns that each stand for more
flushes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from instrument.capture.names import Site
from instrument.diagnose.figures import MAX_COLUMNS, as_value, unit_map
from instrument.diagnose.units import UnitStatus, decode
from instrument.errors import RunError
from instrument.record.documents import UNITS_TAG
from instrument.record.reading import read_steps
from instrument.record.tags import tag_of

__all__ = ["UNIT_MAP", "UnitHistory"]

FloatArray: TypeAlias = "npt.NDArray[np.float64]"

UNIT_MAP = "unit_map"
"""Stands where a statistic stands, for pictures of units."""

CELLS_PER_MODULE = 1 << 20
LEAST_COLUMNS = 16

TWO_SIDED = frozenset({"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign"})
"""Functions that are flat at both ends: what is flat there is full, not silent."""


class UnitHistory:
    """Collects the statuses of units through a run.

    Example:
        >>> history = UnitHistory()
        >>> history.latest, history.picture("blocks.0.relu")
        ({}, None)
    """

    def __init__(self) -> None:
        self.latest: dict[str, UnitStatus] = {}
        """The last status of each module, in the order in which modules came up."""
        self._columns: dict[str, _Columns] = {}
        self._since: dict[str, dict[int, int]] = {}

    @classmethod
    def of_run(
        cls, logdir: Path, progress: Callable[[int], None] | None = None, damages: list[str] | None = None
    ) -> UnitHistory:
        """Read the history of a run.

        Args:
            logdir: Directory of event files.
            progress: Called with the number of bytes read since the last call.
            damages: What files are torn or damaged, and where, is added here.

        Returns:
            The history; without a module where no unit was watched.

        Raises:
            RunError: The files cannot be read, or hold nothing of ours.
        """
        history = cls()
        for contents in read_steps(logdir, progress, damages):
            if UNITS_TAG in contents.documents:
                try:
                    statuses = decode(contents.documents[UNITS_TAG])
                except (RunError, TypeError, AttributeError) as error:
                    raise RunError(
                        f"the units of step {contents.step} in {logdir} were written by another version: {error}"
                    ) from error
                history.add(contents.step, statuses)
        return history

    def add(self, step: int, statuses: Mapping[str, UnitStatus]) -> None:
        """Take the statuses of a flush.

        Args:
            step: Its step; one of an earlier step, where a run was resumed, makes what came from there on void.
            statuses: Module to status.
        """
        for name, status in statuses.items():
            before = self._since.get(name, {})
            self.latest[name] = status
            start = status.first_step if status.first_step is not None else step
            self._since[name] = {unit: min(before.get(unit, start), step) for unit in status.dead}
            if status.rate:
                columns = self._columns.get(name)
                if columns is None or columns.units != len(status.rate):
                    columns = self._columns[name] = _Columns(len(status.rate))
                columns.add(step, status.rate)

    def since(self, name: str) -> dict[int, int]:
        """For each dead unit of a module the step since which it is silent, at the latest."""
        return dict(self._since.get(name, {}))

    def picture(self, name: str) -> Image.Image | None:
        """The unit map of a module; None where nothing is known of its units."""
        columns = self._columns.get(name)
        if columns is None:
            return None
        function = self.latest[name].function
        words = ("always saturated", "never saturated") if function in TWO_SIDED else ("never fires", "always fires")
        return unit_map(name, columns.steps(), columns.rates(), words)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names of the modules of which there is a picture."""
        return tuple(self._columns)

    def value(self, name: str) -> Summary.Value:
        """The unit map of one of the modules that are `drawn`, for an event."""
        image = self.picture(name)
        assert image is not None
        return as_value(tag_of(Site("activations", name), UNIT_MAP), image)


class _Columns:
    """Rates of one module, a column for one flush or for several neighbours."""

    def __init__(self, units: int) -> None:
        self.units = units
        self._limit = max(LEAST_COLUMNS, min(MAX_COLUMNS, CELLS_PER_MODULE // units))
        self._stride = 1
        self._steps: list[list[int]] = []
        """Steps of the flushes in each column."""
        self._codes: list[npt.NDArray[np.uint8]] = []

    def add(self, step: int, rates: tuple[float, ...]) -> None:
        while self._steps and self._steps[-1][-1] >= step:
            self._steps[-1].pop()
            if not self._steps[-1]:
                self._steps.pop()
                self._codes.pop()
        if self._steps and len(self._steps[-1]) < self._stride:
            count = len(self._steps[-1])
            self._codes[-1] = _encoded((_decoded(self._codes[-1]) * count + np.array(rates)) / (count + 1))
            self._steps[-1].append(step)
        else:
            are_alike = rates.count(rates[0]) == len(rates)
            self._codes.append(_alike(rates[0], len(rates)) if are_alike else _encoded(np.array(rates)))
            self._steps.append([step])
        if len(self._steps) > self._limit:
            self._halve()

    def steps(self) -> list[int]:
        """The first step of each column, and of the last one the last."""
        return [steps[0] for steps in self._steps[:-1]] + [self._steps[-1][-1]]

    def rates(self) -> FloatArray:
        """Shape (units, columns)."""
        return np.stack([_decoded(codes) for codes in self._codes], axis=1)

    def _halve(self) -> None:
        """Let each two columns become one."""
        steps, codes = self._steps, self._codes
        self._steps, self._codes, self._stride = [], [], 2 * self._stride
        for index in range(0, len(steps), 2):
            together = steps[index : index + 2]
            weights = [len(each) for each in together]
            rates = [_decoded(each) for each in codes[index : index + 2]]
            self._steps.append([step for each in together for step in each])
            self._codes.append(_encoded(np.average(rates, axis=0, weights=weights)))


# A byte a rate: 0 is exactly zero, 1 to 254 are those above, 255 is unknown.
_UNKNOWN = 255
_STEPS = 253
_LEAST = 1e-6


def _encoded(rates: FloatArray) -> npt.NDArray[np.uint8]:
    known = np.nan_to_num(rates, nan=0.0)
    codes = np.where(known > 0, 1 + np.round(_STEPS * np.clip(known, 0, 1)), 0)
    coded: npt.NDArray[np.uint8] = np.where(np.isnan(rates), _UNKNOWN, codes).astype(np.uint8)
    return coded


@functools.lru_cache(maxsize=16)
def _alike(rate: float, units: int) -> npt.NDArray[np.uint8]:
    """The same of units that all have one rate, as hundreds of modules whose gradients have no row of zeros do."""
    codes = _encoded(np.full(units, rate))
    codes.flags.writeable = False
    return codes


def _decoded(codes: npt.NDArray[np.uint8]) -> FloatArray:
    rates = np.maximum((codes.astype(np.float64) - 1) / _STEPS, _LEAST)
    return np.where(codes == 0, 0.0, np.where(codes == _UNKNOWN, np.nan, rates))
