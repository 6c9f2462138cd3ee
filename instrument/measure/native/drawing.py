"""Histograms in C: cumulative distributions, buckets, and their bytes in an event."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from instrument.measure import recycling
from instrument.measure.columns import Sketches
from instrument.measure.histogram import GRID, SMALLEST, FloatArray, Histograms, IntArray, log10_edges
from instrument.measure.native.library import functions, is_there

__all__ = ["histogram_entries", "histograms_of", "log10_histograms_of"]


_GRID_PLACE = GRID.ctypes.data


def histogram_entries(
    fields: bytes, field_ends: IntArray, moments: bytes, limits: FloatArray, counts: FloatArray, ends: IntArray
) -> npt.NDArray[np.uint8] | None:
    """Histograms in the wire format of protobuf; see `instrument.record.wire`.

    Args:
        fields: What stands before the histogram of each, one behind the other.
        field_ends: Where that of each ends, of shape (histograms,).
        moments: Five numbers of each behind their keys, 45 bytes.
        limits: Right edges of all buckets, of shape (n,).
        counts: Counts of all buckets, of shape (n,).
        ends: Where the buckets of each end, of shape (histograms,).

    Returns:
        Entries of a `Summary`, uint8 of shape (n,); None where they must be made in Python.
    """
    if not is_there() or sys.byteorder != "little":
        return None
    arrays = [np.ascontiguousarray(array) for array in (limits, counts)]
    places = [np.ascontiguousarray(array, np.int64) for array in (field_ends, ends)]
    room = recycling.empty(len(fields) + sum(array.nbytes for array in arrays) + 128 * len(places[0]), np.uint8)
    used = functions().histograms(
        len(places[0]), fields, places[0].ctypes.data, moments, arrays[0].ctypes.data, arrays[1].ctypes.data,
        places[1].ctypes.data, room.ctypes.data,
    )  # fmt: skip
    return room[:used]


def histograms_of(sketches: Sketches) -> tuple[Histograms, FloatArray]:
    """Histograms with narrow buckets near zero, as `instrument.measure.histogram.histograms` makes them.

    Args:
        sketches: Of finite values, at least one each.

    Returns:
        The histograms; and of each sketch the number of values, of zeros among them, and a lower bound of the
        magnitudes of the others, of shape (sketches, 3).
    """
    many = len(sketches)
    arrays = _arrays_of(sketches)
    limits, heights = (recycling.empty(many * (GRID.size + 1), np.float64) for _ in range(2))
    ends, numbers = np.empty(many, np.int64), np.empty((many, 3))
    places = (array.ctypes.data for array in (limits, heights, ends, numbers))
    used = functions().buckets(many, *(array.ctypes.data for array in arrays), _GRID_PLACE, *places)
    np.maximum(numbers[:, 2], SMALLEST, out=numbers[:, 2])
    return Histograms(heights[:used], limits[:used], sketches.column("low"), ends), numbers


def log10_histograms_of(sketches: Sketches, smallest: FloatArray) -> Histograms:
    """Histograms of log10 of magnitudes, as `instrument.measure.histogram.log10_histograms` makes them.

    Args:
        sketches: Of finite values, at least one each.
        smallest: The lower bounds that `histograms_of` gives.
    """
    arrays = _arrays_of(sketches)
    edges, magnitudes = log10_edges(smallest, np.maximum(-arrays[3], arrays[4]))
    heights = np.empty((len(sketches), edges.shape[1] - 1))
    functions().magnitudes(
        len(sketches), *(array.ctypes.data for array in arrays), magnitudes.ctypes.data, edges.shape[1],
        heights.ctypes.data,
    )  # fmt: skip
    ends = np.arange(1, len(heights) + 1) * heights.shape[1]
    return Histograms(heights.ravel(), edges[:, 1:].ravel(), edges[:, 0], ends)


def _arrays_of(sketches: Sketches) -> tuple[npt.NDArray[Any], ...]:
    """Codes, counts, ends, and smallest and largest values, as C reads them."""
    return (
        np.ascontiguousarray(sketches.codes),
        np.ascontiguousarray(sketches.counts, np.int64),
        np.ascontiguousarray(sketches.ends, np.int64),
        np.ascontiguousarray(sketches.column("low")),
        np.ascontiguousarray(sketches.column("high")),
    )
