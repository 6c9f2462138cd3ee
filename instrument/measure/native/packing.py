"""Sketches in few bytes, in C."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from instrument.measure import recycling
from instrument.measure.columns import Sketches
from instrument.measure.histogram import IntArray
from instrument.measure.native.library import functions

__all__ = ["packed", "unpacked"]


def packed(sketches: Sketches) -> bytes:
    """Codes and counts of sketches in a few bits each.

    Args:
        sketches: Any number; counts are at least 1.

    Returns:
        What `unpacked` reads, in this process.
    """
    codes = np.ascontiguousarray(sketches.codes)
    counts, ends = (np.ascontiguousarray(array, np.int64) for array in (sketches.counts, sketches.ends))
    room = recycling.empty(8 * len(ends) + 14 * codes.size, np.uint8)
    places = (array.ctypes.data for array in (codes, counts, ends, room))
    used = functions().pack(len(ends), *places)
    return np.array([len(ends), codes.size], np.uint32).tobytes() + room[:used].tobytes()


def unpacked(data: bytes) -> tuple[npt.NDArray[np.uint16], IntArray, IntArray]:
    """Codes and counts of the sketches, and where each ends."""
    many, size = np.frombuffer(data[:8], np.uint32).tolist()
    codes, counts, ends = np.empty(size, np.uint16), np.empty(size, np.int64), np.empty(many, np.int64)
    body = np.frombuffer(data, np.uint8)[8:]
    functions().unpack(many, body.ctypes.data, codes.ctypes.data, counts.ctypes.data, ends.ctypes.data)
    return codes, counts, ends
