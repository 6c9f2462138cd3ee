"""Rows of accumulators, as a device fills them, and the sketches that they become on the host.

A sketch made of each row by itself took 36 us, most of it to look through 4096 counts in several calls; of many rows at
once it takes 9, and in C 2.
"""

from __future__ import annotations

import numpy as np
import torch

from instrument.measure import native
from instrument.measure.columns import Sketches
from instrument.measure.histogram import CODES, INF_CODE, SIGN
from instrument.measure.sketch import MOMENTS, empty_moments

__all__ = ["NEW_MOMENTS", "WIDTH", "moments_of", "sketches_of_rows"]

WIDTH = CODES + 8
"""Columns of a row of accumulators: codes, moments in the bits of float64, and room to keep rows aligned."""

NEW_MOMENTS = tuple(empty_moments().tolist())
"""Moments of nothing."""


def moments_of(rows: torch.Tensor) -> torch.Tensor:
    """The moments that rows hold, as float64 of shape (..., 5), in the same memory."""
    return rows[..., CODES : CODES + MOMENTS].view(torch.float64)


def sketches_of_rows(rows: torch.Tensor) -> Sketches:
    """The sketches of rows on the host.

    Args:
        rows: Int64 of shape (n, columns), columns as of `WIDTH`. A count of NaN says that a graph could not measure,
            which gives a sketch of nothing.
    """
    if native.is_there():
        return native.sketches_of_rows(rows.numpy())
    codes, moments = rows[:, :CODES].numpy(), moments_of(rows).numpy()
    missing = np.isnan(moments[:, 0])
    if missing.any():
        codes, moments = np.where(missing[:, None], 0, codes), np.where(missing[:, None], empty_moments(), moments)
    found_at = codes.astype(np.bool_).ravel().nonzero()[0]  # of a flat array of bool, which NumPy searches fastest
    ends = np.searchsorted(found_at, CODES * np.arange(1, len(rows) + 1))
    present = (found_at & (CODES - 1)).astype(np.uint16)
    infs = codes[:, INF_CODE] + codes[:, SIGN + INF_CODE]
    nans = codes[:, INF_CODE + 1 : SIGN].sum(axis=1) + codes[:, SIGN + INF_CODE + 1 :].sum(axis=1)
    zeros, share = codes[:, 0] + codes[:, SIGN], np.ones(len(rows))
    numbers = np.column_stack((moments[:, 1:], moments[:, 0], zeros, nans, infs, share))  # as `FIELDS` are
    return Sketches(present, codes[found_at // CODES, present], ends, numbers)
