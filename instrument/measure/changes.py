"""What changed between two copies of many small tensors, measured together when somebody asks.

The difference of two float32 is no float32, so moments are those of float64 and the codes alone of float32, as of any
float64 tensor.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from instrument.measure.batch import Column
from instrument.measure.columns import Sketches
from instrument.measure.cpu import as_single
from instrument.measure.groups import Group
from instrument.measure.histogram import IntArray
from instrument.measure.segments import sketches_of_double
from instrument.measure.small import cut

__all__ = ["measure_changes"]


def measure_changes(before: torch.Tensor, after: torch.Tensor, sizes: list[int]) -> Column:
    """Measure what has changed of small tensors.

    Args:
        before: Their values, one tensor behind the other, of shape (n,): float32 or narrower, on the CPU.
        after: Their values now. Nobody may change either any more.
        sizes: How many elements each has, from 1 to `SMALL`.

    Returns:
        As for `measure_later`.

    Example:
        >>> import torch
        >>> column = measure_changes(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), [1, 2])
        >>> [item.sketch().mean for item in column]
        [1.0, 3.0]
    """
    column, start = Column(), 0
    for part, size in cut(sizes):
        own = slice(start, start + size)
        column.items += column.add_group(_Changes(before[own], after[own], sizes[part]))
        start += size
    return column


class _Changes(Group):
    """Changes of small tensors."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: torch.Tensor, after: torch.Tensor, sizes: list[int]) -> None:
        super().__init__()
        self._before, self._after = before, after
        self._ends, self.is_full = list(itertools.accumulate(sizes)), True

    def _values(self) -> torch.Tensor:
        before, after = (as_single(values).numpy() for values in (self._before, self._after))
        with np.errstate(invalid="ignore"):  # between one infinity and the same there is no number
            return torch.from_numpy(np.subtract(after, before, dtype=np.float64))

    def _forget(self) -> None:
        self._before = self._after = torch.empty(0)

    def _sketches_of(self, flat: torch.Tensor, lengths: IntArray) -> Sketches:
        exact = flat.numpy()
        with np.errstate(over="ignore"):  # what no float32 holds is looked at by itself
            single = torch.from_numpy(exact.astype(np.float32))
        return sketches_of_double(exact, lengths, super()._sketches_of(single, lengths))
