"""Tallies of units where a tensor lies, fetched when somebody asks: nothing waits in a hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.slopes import Slopes
from instrument.measure.units.shape import COUNTED, cube_of
from instrument.measure.units.tally import DeviceTally, UnitTally

__all__ = ["tally_on_device"]


def tally_on_device(tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> DeviceTally:
    """`tally_units` by operations of torch alone, of which none waits for the device; every sample is counted.

    Args:
        tensor: As `whole` gives it, with at least one element.
        axis: As in `tally_units`.
        slopes: As in `tally_units`.

    Returns:
        What will give the tally.
    """
    cube = cube_of(tensor, axis)
    # Counts below 16 million are exact in float32, and not every device has float64.
    dtype = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    # One kernel for both extremes where it can be had: each launch takes the training thread 10 us.
    extremes = cube[:, :, 0].aminmax(dim=0) if cube.shape[2] == 1 else (cube.amin((0, 2)), cube.amax((0, 2)))
    sample = cube[::COUNTED]
    norm = torch.linalg.vector_norm(sample, dtype=dtype)
    found = [torch.stack(tuple(extremes)).to(dtype), norm.expand(1, cube.shape[1])]
    if slopes is not None:
        is_flat, is_dead = (((cube <= t.low) | (cube >= t.high)).all(2) for t in (slopes.flat, slopes.dead))
        found.append(torch.stack((is_flat.sum(0), is_dead.all(0))).to(dtype))
    samples, sampled = len(cube), sample.numel()
    return DeviceTally(torch.cat(found), lambda numbers: _unpacked(numbers, slopes, samples, sampled))


def _unpacked(numbers: npt.NDArray[np.floating[Any]], slopes: Slopes | None, samples: int, sampled: int) -> UnitTally:
    """The tally of what `tally_on_device` packed: lows, highs, norm of a sample, and flat and dead where judged."""
    low, high, norm, *judged = numbers.astype(np.float64)
    squares = norm**2 / sampled
    units = low.size
    never = np.zeros(units, np.bool_)
    if slopes is None:
        return UnitTally(None, samples, 1, low, high, 0, np.zeros(units, np.int64), never, never, squares[0])
    if slopes.is_piecewise_linear:
        never = (low > slopes.flat.low) & (high < slopes.flat.high)
    flat, dead = judged[0].astype(np.int64), judged[1] > 0
    return UnitTally(slopes.function, samples, 1, low, high, samples, flat, dead, never, float(squares[0]))
