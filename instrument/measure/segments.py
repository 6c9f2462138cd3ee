"""Sketches of many small tensors that lie one behind the other.

Counts of 4096 codes a tensor would mostly be zeros, and to look through them took longer than the elements. Codes
that occur anywhere in the batch are numbered, a few hundred of them, and counts made of those; the numbers of the
last batch are tried first.

Sums are made in the order in which NumPy adds up one tensor, so that a tensor measures alike in any company.
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.columns import Sketches
from instrument.measure.cpu import BLOCK, FLOAT32_MAX, count_numbers, measure_exactly
from instrument.measure.histogram import CODES, SIGN, FloatArray
from instrument.measure.sketch import IntArray, Sketch

__all__ = ["sketches_of", "sketches_of_double"]

_CODE_SHIFT = np.uint32(20)

_MOST_NUMBERS = 1024
"""Numbered codes beyond which those that no longer occur are given up."""


class _Room(threading.local):
    """Room for one group, once a thread, and the numbers of the codes that occurred in the last ones."""

    def __init__(self) -> None:
        self.double = np.empty(BLOCK, np.float64)
        self.bits = np.empty(BLOCK, np.uint32)
        self.codes = np.empty(BLOCK, np.int64)
        self.keys = torch.empty(BLOCK, dtype=torch.int32)
        self.keys_array = self.keys.numpy()
        self.number(np.empty(0, np.int64))

    def number(self, present: IntArray) -> None:
        """Number the codes that occur; all others share the number that follows."""
        self.present = present
        self.numbers = np.full(CODES, present.size, np.int32)
        self.numbers[present] = np.arange(present.size)


_room = _Room()


def sketches_of(flat: npt.NDArray[np.float32], lengths: IntArray) -> Sketches:
    """Sketches of values that stand one tensor behind the other, 1 to `BLOCK` in all.

    Args:
        flat: The values, float32 of shape (n,).
        lengths: How many of them each tensor has, at least 1.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    with np.errstate(all="ignore"):  # sums of Inf are NaN, which is not used
        low, high = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
        is_rare = ~(np.isfinite(low) & np.isfinite(high))
        double = _room.double[: flat.size]
        np.copyto(double, flat)
        totals = np.add.reduceat(double, starts)
        np.multiply(double, double, out=double)
        squares = np.add.reduceat(double, starts)
    occurring, counts, cuts = _count_codes(flat, lengths)
    zeros = np.add.reduceat(np.where(occurring & (SIGN - 1) == 0, counts, 0), cuts[:-1])
    # Code 0 takes what lies below 1.5e-39 too, zero or not.
    if zeros.any() and zeros.sum() != flat.size - np.count_nonzero(flat):
        is_rare |= zeros != np.add.reduceat(flat == 0, starts, dtype=np.int64)
    nothing = np.zeros(lengths.size)
    numbers = np.stack((totals, squares, low, high, lengths, zeros, nothing, nothing, nothing + 1.0), axis=1)
    found = Sketches(occurring, counts, cuts[1:], numbers)
    return _with_exact(found, is_rare, flat, lengths)


def sketches_of_double(flat: FloatArray, lengths: IntArray, single: Sketches) -> Sketches:
    """The same of float64.

    Args:
        flat: The values, float64 of shape (n,).
        lengths: How many of them each tensor has, at least 1.
        single: The sketches of the same values as float32, whose codes are theirs.
    """
    starts = np.cumsum(lengths) - lengths
    with np.errstate(all="ignore"):  # sums of Inf are NaN, which is not used
        low, high = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
        moments = np.add.reduceat(flat, starts), np.add.reduceat(np.square(flat), starts), low, high
    is_rare = ~((low >= -FLOAT32_MAX) & (high <= FLOAT32_MAX))
    is_rare |= single.column("zero_count") != np.add.reduceat(flat == 0, starts, dtype=np.int64)
    numbers = np.concatenate((np.stack(moments, axis=1), single.numbers[:, len(moments) :]), axis=1)
    return _with_exact(dataclasses.replace(single, numbers=numbers), is_rare, flat, lengths)


def _with_exact(
    found: Sketches, is_rare: npt.NDArray[np.bool_], flat: npt.NDArray[np.float32] | FloatArray, lengths: IntArray
) -> Sketches:
    """Sketches of which those that hold rare values are made by themselves."""
    if not is_rare.any():
        return found
    ends = np.cumsum(lengths)
    sketches = list(found)
    for index in is_rare.nonzero()[0].tolist():
        sketches[index] = Sketch.from_dense(*measure_exactly(flat[ends[index] - lengths[index] : ends[index]]))
    return Sketches.of(sketches)


def _count_codes(
    flat: npt.NDArray[np.float32], lengths: IntArray
) -> tuple[npt.NDArray[np.uint16], IntArray, npt.NDArray[np.intp]]:
    """Codes that occur and their counts, one tensor behind the other, and the places where tensors begin and end."""
    bits, codes = _room.bits[: flat.size], _room.codes[: flat.size]
    np.right_shift(flat.view(np.uint32), _CODE_SHIFT, out=bits)
    np.copyto(codes, bits)
    firsts, dense = _count_numbers(codes, lengths)
    others = dense[_room.present.size :: _room.present.size + 1]
    if others.any():
        occurring = np.bincount(codes, minlength=CODES).astype(np.bool_)
        if _room.present.size <= _MOST_NUMBERS:
            occurring[_room.present] = True
        _room.number(occurring.nonzero()[0])
        firsts, dense = _count_numbers(codes, lengths)
    found = dense.astype(np.bool_).nonzero()[0]
    cuts = np.searchsorted(found, firsts)
    numbers = found - np.repeat(firsts[:-1], np.diff(cuts))
    return _room.present[numbers].astype(np.uint16), dense[found], cuts


def _count_numbers(codes: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Where the counts of each tensor begin, and how often each number occurs in it."""
    keys = _room.keys_array[: codes.size]
    np.take(_room.numbers, codes, out=keys, mode="clip")  # other modes copy what they are given
    firsts = np.arange(lengths.size + 1) * (_room.present.size + 1)
    np.add(keys, np.repeat(firsts[:-1].astype(np.int32), lengths), out=keys)
    return firsts, count_numbers(_room.keys[: codes.size], int(firsts[-1]))
