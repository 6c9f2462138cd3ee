"""Rows of accumulators, as a device fills them, and the sketches that they become on the host.

A sketch made of each row by itself took 36 us, most of it to look through 4096 counts in several calls; of many rows at
once it takes 5.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from instrument.measure.histogram import CODES, INF_CODE, SIGN
from instrument.measure.segments import made_sketch
from instrument.measure.sketch import MOMENTS, Sketch

__all__ = ["NEW_MOMENTS", "WIDTH", "moments_of", "sketches_of_rows"]

WIDTH = CODES + 8
"""Columns of a row of accumulators: codes, moments in the bits of float64, and room to keep rows aligned."""

NEW_MOMENTS = (0.0, 0.0, 0.0, math.inf, -math.inf)
"""Moments of nothing."""


def moments_of(rows: torch.Tensor) -> torch.Tensor:
    """The moments that rows hold, as float64 of shape (..., 5), in the same memory."""
    return rows[..., CODES : CODES + MOMENTS].view(torch.float64)


def sketches_of_rows(rows: torch.Tensor) -> list[Sketch]:
    """The sketches of rows on the host.

    Args:
        rows: Int64 of shape (n, columns), columns as of `WIDTH`; a few hundred rows take a millisecond or two. A count
            of NaN says that a graph could not measure, which gives a sketch of nothing.
    """
    codes = rows[:, :CODES].numpy()
    found_at = codes.astype(np.bool_).ravel().nonzero()[0]  # of a flat array of bool, which NumPy searches fastest
    cuts = np.searchsorted(found_at, CODES * np.arange(len(rows) + 1)).tolist()
    present = (found_at & (CODES - 1)).astype(np.uint16)
    counts = codes[found_at // CODES, present]
    zeros = codes[:, 0] + codes[:, SIGN]
    infs = codes[:, INF_CODE] + codes[:, SIGN + INF_CODE]
    nans = codes[:, INF_CODE + 1 : SIGN].sum(axis=1) + codes[:, SIGN + INF_CODE + 1 :].sum(axis=1)
    fields = zip(moments_of(rows).tolist(), zeros.tolist(), nans.tolist(), infs.tolist(), strict=True)
    found = []
    for (start, end), ((count, total, squares, low, high), zero, nan, inf) in zip(
        itertools.pairwise(cuts), fields, strict=True
    ):
        if math.isnan(count):
            found.append(Sketch.empty())
            continue
        # Copies: all that is found here would otherwise be kept as long as any of it.
        own = present[start:end].copy(), counts[start:end].copy()
        found.append(made_sketch(*own, total, squares, low, high, int(count), zero, nan, inf))
    return found
