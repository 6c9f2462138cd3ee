"""Ranges, flat samples and zero rows of units, in C."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.native.library import Rooms, functions
from instrument.measure.native.sketches import KINDS

__all__ = ["flat_of", "ranges_of", "ranges_of_many", "zero_rows_in", "zero_rows_of"]

_UNITS = 8192
"""Units of which the ranges, or rows of which the flags have room that is there already."""


class _Room:
    """Room for what is found of the units of one tensor, and where it lies."""

    def __init__(self) -> None:
        self.lows, self.highs = np.empty(_UNITS, np.float32), np.empty(_UNITS, np.float32)
        self.places = self.lows.ctypes.data, self.highs.ctypes.data
        self.rows = np.empty(_UNITS, np.bool_)
        self.rows_place = self.rows.ctypes.data


_rooms = Rooms(_Room)


def ranges_of(
    tensor: torch.Tensor, cube: tuple[int, int, int], every: tuple[int, int, int]
) -> tuple[FloatArray, FloatArray, float]:
    """Range of each unit, and the scale of the values.

    Args:
        tensor: One that `can_measure` allows.
        cube: As how many samples, units and positions it is read.
        every: Of how many samples, units and positions one is looked at for the scale.

    Returns:
        Smallest and largest value of each unit, float64, NaN where one was NaN; mean square of the values looked at.
    """
    call = functions(tensor.numel())
    units, room = cube[1], _rooms.take()
    lows, highs, places = room.lows, room.highs, room.places
    if units > _UNITS:
        lows, highs = np.empty(units, np.float32), np.empty(units, np.float32)
        places = lows.ctypes.data, highs.ctypes.data
    squares = call.ranges(tensor.data_ptr(), KINDS[tensor.dtype], *cube, *every, *places)
    found = lows[:units].astype(np.float64), highs[:units].astype(np.float64), squares
    _rooms.give_back(room)
    return found


def flat_of(tensor: torch.Tensor, cube: tuple[int, int, int], step: int, low: float, high: float) -> IntArray:
    """On how many samples each unit was flat.

    Args:
        tensor: One that `can_measure` allows.
        cube: As how many samples, units and positions it is read.
        step: Of how many samples one is looked at.
        low: A sample is flat where all its positions are at most this,
        high: or at least this; infinite where there is no such tail.

    Returns:
        Int64 of shape (units,).
    """
    call = functions(tensor.numel() // step)
    flat = np.empty(cube[1], np.int64)
    # Where there is no tail, Inf is not in it either: nothing compares with NaN.
    tails = low if low > -math.inf else math.nan, high if high < math.inf else math.nan
    call.flat(tensor.data_ptr(), KINDS[tensor.dtype], *cube, step, *tails, flat.ctypes.data)
    return flat


def zero_rows_of(tensor: torch.Tensor) -> npt.NDArray[np.bool_] | None:
    """Which rows of a tensor are zero in whole.

    Args:
        tensor: One that `can_measure` allows, of shape (rows, ...).

    Returns:
        Bool of shape (rows,); None where no row is.
    """
    call = functions(tensor.numel())
    rows, room = len(tensor), _rooms.take()
    found, place = room.rows, room.rows_place
    if rows > _UNITS:
        found = np.empty(rows, np.bool_)
        place = found.ctypes.data
    some = call.zero_rows(tensor.data_ptr(), KINDS[tensor.dtype], rows, tensor.numel() // rows, place)
    zero = found[:rows].copy() if some else None
    _rooms.give_back(room)
    return zero


def ranges_of_many(
    flat: torch.Tensor, starts: IntArray, cubes: IntArray, every: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Ranges of the units of tensors that lie one behind the other.

    Args:
        flat: Their values, of shape (n,); one that `can_measure` allows.
        starts: Where those of each begin, of shape (tensors,).
        cubes: As how many samples, units and positions each is read, of shape (tensors, 3).
        every: Of how many of them one is looked at for the scale, of shape (tensors, 3).

    Returns:
        Smallest and largest value of each unit, one tensor behind the other; and the mean square of each tensor.
    """
    starts, cubes, every = (np.ascontiguousarray(array, np.int64) for array in (starts, cubes, every))
    lows, highs = (np.empty(int(cubes[:, 1].sum()), np.float32) for _ in range(2))
    squares = np.empty(len(starts))
    places = (array.ctypes.data for array in (starts, cubes, every, lows, highs, squares))
    functions().ranges_of_many(flat.data_ptr(), KINDS[flat.dtype], len(starts), *places)
    return lows.astype(np.float64), highs.astype(np.float64), squares


def zero_rows_in(flat: torch.Tensor, starts: IntArray, rows: IntArray, widths: IntArray) -> IntArray:
    """How many rows of each of several tensors are zero in whole.

    Args:
        flat: Their values, of shape (n,); one that `can_measure` allows.
        starts: Where those of each begin, of shape (tensors,).
        rows: How many rows each has,
        widths: of how many values.

    Returns:
        Int64 of shape (tensors,).
    """
    arrays = [np.ascontiguousarray(array, np.int64) for array in (starts, rows, widths)]
    room = np.empty(int(arrays[1].max()), np.uint8)
    found = np.empty(len(starts), np.int64)
    places = (*(array.ctypes.data for array in arrays), room.ctypes.data, found.ctypes.data)
    functions().zero_rows_in(flat.data_ptr(), KINDS[flat.dtype], len(starts), *places)
    return found
