"""The statistics of many sketches at once, as TensorBoard and the diagnoses take them.

A record of a deep network of small layers has more than a thousand sketches. To ask each for its seven statistics, and
for the event file and the diagnoses anew, took 20 us a sketch and step; columns of NumPy take 2.
"""

from __future__ import annotations

import numpy as np

from instrument.measure.columns import Sketches
from instrument.measure.histogram import FloatArray
from instrument.record.tags import COUNTS, STATISTICS

__all__ = ["COLUMNS", "SLICE", "statistics_of"]

COLUMNS = (*STATISTICS, *COUNTS)
"""What the columns of `statistics_of` are."""

SLICE = 256
"""Tensors for which Python makes objects before others may have the lock: a few microseconds each."""


def statistics_of(sketches: Sketches) -> FloatArray:
    """The statistics of sketches.

    Args:
        sketches: The sketches.

    Returns:
        Float64 of shape (sketches, `COLUMNS`), each as the property of `Sketch` by that name gives it: NaN, but for
        the counts, where a sketch has no finite value.

    Example:
        >>> import torch
        >>> from instrument import measure
        >>> of_one = statistics_of(Sketches.of([measure(torch.tensor([3.0, 0.0]))]))[0]
        >>> dict(zip(COLUMNS, of_one.tolist()))["abs_max"]
        3.0
    """
    total, squares, low, high, count, zeros, nans, infs, _ = sketches.numbers.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mean, mean_square = total / count, squares / count
        std = np.sqrt(np.maximum(mean_square - mean * mean, 0.0))
        std[np.isinf(squares)] = np.inf
        std[low == high] = 0.0
        found = {
            "rms": np.sqrt(mean_square),
            "mean": mean,
            "std": std,
            "abs_max": np.maximum(np.abs(low), np.abs(high)),
            "zero_fraction": zeros / count,
            "nan_count": nans,
            "inf_count": infs,
        }
    table = np.stack([found[name] for name in COLUMNS], axis=1)
    table[count == 0, : len(STATISTICS)] = np.nan
    return table
