"""What a step changes: parameters are remembered before it, and held against what they are behind it.

By itself each small parameter took 80 us a step, most of it to be copied, subtracted and measured in float64. Those
that are alike are copied by one call, subtracted by another, and measured together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from instrument.capture.names import Site, site_of
from instrument.capture.parameters import Pairs, Parameters
from instrument.measure.batch import Column
from instrument.measure.changes import measure_changes
from instrument.measure.small import small_together
from instrument.torch_private import Unseen, can_hide, flattened

__all__ = ["Updates"]


class _Values(NamedTuple):
    """Values of small parameters at one time."""

    names: list[str]
    sizes: list[int]
    """Elements of each."""
    flat: torch.Tensor
    """The values, one parameter behind the other."""

    def fits(self, other: _Values) -> bool:
        """Whether others are of the same parameters, of the same size and type."""
        return self[:2] == other[:2] and self.flat.dtype is other.flat.dtype


class Updates:
    """Tells what steps change of parameters.

    Args:
        parameters: Tells of those that are not small, or unlike each other, one by one.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._before: _Values | None = None

    def remember(self, pairs: Pairs, are_whole: bool) -> None:
        """Keep the values of parameters as they are before a step.

        Args:
            pairs: The parameters.
            are_whole: Whether each is one tensor, and no part of one that is spread over ranks.
        """
        self._part_with()
        self._before = _values_of(pairs) if are_whole else None
        self._parameters.forget(self._before.names if self._before is not None else ())
        self._parameters.remember(_without(pairs, self._before))

    def together(self, pairs: Pairs) -> tuple[list[Site], Column] | None:
        """What a step has changed of those that were remembered together; None where there are none.

        Args:
            pairs: The parameters as they are behind the step.

        Returns:
            Sites, and what will give the sketch of each.
        """
        before = self._before
        after = _values_of(pairs) if before is not None else None
        if before is None or after is None or not after.fits(before):
            self._part_with()
            return None
        self._before = None
        sites = [site_of("updates", name) for name in after.names]
        with Unseen():
            return sites, measure_changes(before.flat, after.flat, after.sizes)

    @staticmethod
    def in_order(pairs: Pairs, sites: list[Site], column: Column) -> list[Site]:
        """Have sites, and what was found of each, in the order of the parameters; the sites as they are then."""
        places = {name: place for place, (name, _) in enumerate(pairs)}
        order = sorted(range(len(sites)), key=lambda place: places[sites[place].name])
        column.items[:] = [column.items[place] for place in order]
        return [sites[place] for place in order]

    def alone(self, pairs: Pairs) -> Iterator[tuple[Site, torch.Tensor]]:
        """What a step has changed of all others; see `Parameters.updates`."""
        return self._parameters.updates(pairs)

    def _part_with(self) -> None:
        """Have those that were remembered together looked at one by one."""
        before, self._before = self._before, None
        if before is not None:
            with Unseen():
                for name, values in zip(before.names, before.flat.split(before.sizes), strict=True):
                    self._parameters.remember_as(name, values)


def _values_of(pairs: Pairs) -> _Values | None:
    """Copies of the values of small parameters that are alike; None where they are not."""
    if not can_hide():
        return None
    try:
        with Unseen():
            tensors: Sequence[torch.Tensor] = [parameter for _, parameter in pairs]
            known = small_together(tensors)
            sizes = known[0] if known is not None else []
            if not any(sizes):
                return None
            names = [name for (name, _), size in zip(pairs, sizes, strict=True) if size]
            return _Values(names, list(filter(None, sizes)), flattened(list(itertools.compress(tensors, sizes))))
    except Exception:  # one of them cannot be asked or copied; it tells why when it is by itself
        return None


def _without(pairs: Pairs, values: _Values | None) -> Pairs:
    """The parameters that are not among these."""
    known = frozenset(values.names) if values is not None else frozenset()
    return [pair for pair in pairs if pair[0] not in known]
