"""How the dimensions of a tensor are read: as samples, units and positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

__all__ = ["COUNTED", "SCALE_SAMPLE", "SPACING", "cube_of", "scale_steps", "sides"]

COUNTED = 64
"""Samples of one call, at most, whose flatness is counted; their number fits into a byte."""

SPACING = 61
"""Of so many samples a kernel looks at one for the scale; a prime, so that it does not meet the same positions of each
sequence, or one column of each image, alone."""

SCALE_SAMPLE = 4096
"""Values of which the mean square is taken: it is a scale, and no statistic that anybody sees."""


def sides(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """How many samples, units and positions a tensor of a shape has, whose units are of this dimension."""
    shape = tuple(shape)  # parts of a `torch.Size` take a microsecond each
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def cube_of(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The tensor as samples, units and positions, of shape (s, u, p); a view wherever possible."""
    return tensor.reshape(sides(tensor.shape, axis))


@functools.lru_cache(maxsize=4096)
def scale_steps(samples: int, units: int, positions: int) -> tuple[int, int, int]:
    """Of how many samples, units and positions one is looked at for the scale: `SCALE_SAMPLE` values or fewer."""
    every = max(1, samples // 8)
    across = math.ceil(units * positions * math.ceil(samples / every) / SCALE_SAMPLE)
    along = min(across, max(1, positions // 8))
    return every, math.ceil(across / along), along
