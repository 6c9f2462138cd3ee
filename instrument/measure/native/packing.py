"""Sketches in few bytes, in C."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from instrument.measure import recycling
from instrument.measure.columns import Sketches
from instrument.measure.histogram import IntArray
from instrument.measure.native.library import functions

__all__ = ["packed", "unpacked"]


def packed(sketches: Sketches, part: int) -> list[bytes]:
    """Codes and counts of sketches in a few bits each.

    Args:
        sketches: Any number; counts are at least 1.
        part: How many of them are packed together.

    Returns:
        Of each part what `unpacked` reads, in this process.
    """
    codes = np.ascontiguousarray(sketches.codes)
    counts, ends = (np.ascontiguousarray(array, np.int64) for array in (sketches.counts, sketches.ends))
    room = recycling.empty(8 * len(ends) + 14 * codes.size, np.uint8)
    part_ends = np.empty(-(-len(ends) // part), np.int64)
    functions().pack(len(ends), part, *(array.ctypes.data for array in (codes, counts, ends, room, part_ends)))
    lasts = np.minimum(np.arange(1, len(part_ends) + 1) * part, len(ends))
    heads = np.stack([np.diff(lasts, prepend=0), np.diff(ends[lasts - 1], prepend=0)], axis=1).astype(np.uint32)
    bounds = itertools.pairwise([0, *part_ends.tolist()])
    return [head.tobytes() + room[start:end].tobytes() for head, (start, end) in zip(heads, bounds, strict=True)]


def unpacked(data: bytes) -> tuple[npt.NDArray[np.uint16], IntArray, IntArray]:
    """Codes and counts of the sketches, and where each ends."""
    many, size = np.frombuffer(data[:8], np.uint32).tolist()
    codes, counts, ends = np.empty(size, np.uint16), np.empty(size, np.int64), np.empty(many, np.int64)
    body = np.frombuffer(data, np.uint8)[8:]
    functions().unpack(many, body.ctypes.data, codes.ctypes.data, counts.ctypes.data, ends.ctypes.data)
    return codes, counts, ends
