"""Tallies of units where a tensor lies, fetched when somebody asks: nothing waits in a hook."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.device import Devices
from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.slopes import Slopes
from instrument.measure.units.shape import COUNTED, SPACING, cube_of, sides
from instrument.measure.units.tally import BoolArray, DeviceTally, UnitTally

__all__ = ["tally_on_device"]


_LONG, _FEW = 4096, 256
"""Positions, and images, for which operations of torch make better use of a device."""

_MOST_SAMPLES = 2**31 - 2**24
"""Samples that a kernel can count, and a block behind them."""


def tally_on_device(
    tensor: torch.Tensor, axis: int, slopes: Slopes | None, devices: Devices | None = None
) -> DeviceTally:
    """`tally_units` of a tensor on a device, which is not waited for; every sample is counted.

    Args:
        tensor: As `whole` gives it, with at least one element.
        axis: As in `tally_units`.
        slopes: As in `tally_units`.
        devices: What travels with the tally to the host. Where a kernel can tally, that takes one launch; without
            either it takes a dozen operations of torch and a copy.

    Returns:
        What will give the tally.
    """
    if devices is not None and devices.can_tally(tensor):
        lying = _lying(tensor, axis, slopes)
        if lying is not None:
            samples = sides(tensor.shape, axis)[0]
            columns = devices.tally(tensor, lying, slopes)
            sampled = math.ceil(lying[0] / SPACING) * lying[1] * lying[2]
            return DeviceTally(columns, samples, lambda found: _of_columns(found, slopes, samples, sampled))
    return _by_operations(tensor, axis, slopes)


def _lying(tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> tuple[int, int, int] | None:
    """Samples, units and positions in the order in which they lie; None where a kernel cannot read them well."""
    samples, units, positions = lying = sides(tensor.shape, axis)
    if not tensor.is_contiguous():
        if slopes is not None or not tensor.movedim(axis, -1).is_contiguous():
            return None
        lying = samples * positions, units, 1  # channels last: a range is over samples anyway
    # A few large images would be left to as few programs, and numbers of samples are of 32 bits.
    is_idle = lying[2] > _LONG and samples * units < _FEW
    return None if is_idle or lying[0] > _MOST_SAMPLES else lying


def _of_columns(columns: npt.NDArray[np.float64], slopes: Slopes | None, samples: int, sampled: int) -> UnitTally:
    """The tally of what a kernel has added to columns."""
    low, high, squares, nan, flat, alive = columns
    low, high = np.where(nan > 0, math.nan, low), np.where(nan > 0, math.nan, high)
    judged = None if slopes is None else (flat.astype(np.int64), alive == 0)
    return _tally(low, high, float(squares.sum()) / sampled, judged, slopes, samples)


def _by_operations(tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> DeviceTally:
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
    return DeviceTally(torch.cat(found), samples, lambda numbers: _unpacked(numbers, slopes, samples, sampled))


def _unpacked(numbers: npt.NDArray[np.floating[Any]], slopes: Slopes | None, samples: int, sampled: int) -> UnitTally:
    """The tally of what operations packed: lows, highs, norm of a sample, and flat and dead where judged."""
    low, high, norm, *found = numbers.astype(np.float64)
    judged = None if slopes is None else (found[0].astype(np.int64), found[1] > 0)
    return _tally(low, high, float(norm[0] ** 2) / sampled, judged, slopes, samples)


def _tally(
    low: FloatArray, high: FloatArray, square_mean: float, judged: tuple[IntArray, BoolArray] | None,
    slopes: Slopes | None, samples: int,
) -> UnitTally:  # fmt: skip
    """A tally of ranges, and of flat samples and dead units where they are judged."""
    never = np.zeros(low.size, np.bool_)
    if slopes is None or judged is None:
        return UnitTally(None, samples, 1, low, high, 0, np.zeros(low.size, np.int64), never, never, square_mean)
    if slopes.is_piecewise_linear:
        never = (low > slopes.flat.low) & (high < slopes.flat.high)
    return UnitTally(slopes.function, samples, 1, low, high, samples, *judged, never, square_mean)
