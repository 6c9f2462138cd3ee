"""The loops over elements, in C where the package was installed with a compiler at hand.

Whoever calls these asks `can_measure` first and does the same in NumPy where it says no: codes and counts are equal,
sums are made in another order. Measured on one core with torch 2.13, in one run: 10 million float32 take 0.9 ns an
element where NumPy takes 3.0, 10 million bfloat16 1.3 and 2.5, a tensor of a thousand elements 8 us and 31.
"""

from __future__ import annotations

from instrument.measure.native.drawing import histogram_entries, histograms_of, log10_histograms_of
from instrument.measure.native.library import SHORT, is_there
from instrument.measure.native.packing import packed, unpacked
from instrument.measure.native.sketches import (
    PATTERNS,
    address_of,
    can_measure,
    can_read,
    counts_of,
    counts_of_array,
    gathered,
    patterns_of,
    sketch_of,
    sketches_of,
    sketches_of_rows,
)
from instrument.measure.native.units import flat_of, ranges_of, ranges_of_many, zero_rows_in, zero_rows_of

__all__ = [
    "PATTERNS",
    "SHORT",
    "address_of",
    "can_measure",
    "can_read",
    "counts_of",
    "counts_of_array",
    "flat_of",
    "gathered",
    "histogram_entries",
    "histograms_of",
    "is_there",
    "log10_histograms_of",
    "packed",
    "patterns_of",
    "ranges_of",
    "ranges_of_many",
    "sketch_of",
    "sketches_of",
    "sketches_of_rows",
    "unpacked",
    "zero_rows_in",
    "zero_rows_of",
]
