"""Measuring on the CPU: blocks that stay in the cache, through scratch that is allocated once a thread.

What shaped it, measured on one core with torch 2.13 and NumPy 2.4 (nanoseconds an element of 10 million):

* blocks of 131,072 elements take 1.6 in all, of 32,704 take 2.2 and of 16,384 take 2.8: the calls of NumPy and
  torch are dearer than they look, and 1 MB of float64 scratch still lies in a second-level cache of today;
* NumPy computes on the calling thread only, whereas torch wakes its threads inside every operation from 32,768
  elements on, which costs more than it gains; `numpy.dot` wakes none up to 10,000 elements;
* `torch.bincount` of int32 takes 1.1, `numpy.bincount`, which wants int64, 1.4; below a few thousand elements
  the shorter call of NumPy wins;
* `count_nonzero` branches on each value, 4.6 for the output of a ReLU; compare and count takes 0.1.

Sums are of float64 copies: sums of squares in float32 overflow from 1.8e19 on, and a variance far from zero
loses all its digits.
"""

from __future__ import annotations

import math
import threading
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.sketch import CODES, FloatArray, IntArray, Sketch, empty_moments
from instrument.measure.tensors import Values, chunks

__all__ = ["BLOCK", "accumulate_cpu", "measure_cpu"]

BLOCK = 131_072
"""Elements in a block."""

SMALL = 8192
"""Up to here `numpy.bincount` is used; also the length of the pieces that `numpy.dot` is given."""

_WIDE = frozenset(
    dtype
    for dtype in (
        torch.float64,
        torch.int32,
        torch.int64,
        getattr(torch, "uint32", None),
        getattr(torch, "uint64", None),
    )
    if dtype is not None
)
"""Types whose values do not all fit into float32: they are read as float64 first."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NAN_CODE, _POSITIVE_INF_CODE, _NEGATIVE_INF_CODE = 0x7FC, 0x7F8, 0xFF8
_SIGN = 2048

_CODE_SHIFT = np.uint32(20)

_Float32Array: TypeAlias = "npt.NDArray[np.float32]"
_Measured: TypeAlias = "tuple[IntArray, list[float]]"
"""Counts of codes; count, sum, sum of squares, minimum and maximum of the finite values."""


class _Scratch(threading.local):
    """Room for one block, once a thread: hooks may run in the autograd threads of several devices."""

    def __init__(self) -> None:
        self.float32 = torch.empty(BLOCK, dtype=torch.float32)
        self.float64 = torch.empty(BLOCK, dtype=torch.float64)
        self.codes = torch.empty(BLOCK, dtype=torch.int32)
        self.float32_array = self.float32.numpy()
        self.float64_array = self.float64.numpy()
        self.codes_array = self.codes.numpy().view(np.uint32)
        self.is_zero = np.empty(BLOCK, np.bool_)


_scratch = _Scratch()


def measure_cpu(values: Values) -> Sketch:
    """Measure the values of a tensor on the CPU; call it under `Unseen`.

    Args:
        values: The values, on the CPU.

    Returns:
        The sketch.
    """
    if values.repeat == 1 and not values.implied_zeros and 0 < values.tensor.numel() <= BLOCK:
        with np.errstate(all="ignore"):
            return Sketch.from_dense(*_measure_block(values.tensor))
    codes, moments = np.zeros(CODES, np.int64), empty_moments()
    accumulate_cpu(values, codes, moments)
    return Sketch.from_dense(codes, moments.tolist())


def accumulate_cpu(values: Values, codes: IntArray, moments: FloatArray) -> None:
    """Add the values of a tensor to counts of codes and to moments; call it under `Unseen`.

    Args:
        values: The values, on the CPU.
        codes: Int64 of shape (4096,), added to in place.
        moments: Float64 of shape (5,), combined in place: count, sum, sum of squares, minimum, maximum.
    """
    with np.errstate(all="ignore"):
        for piece in chunks(values.tensor, BLOCK):
            counts, found = _measure_block(piece)
            if values.repeat != 1:
                counts *= values.repeat
                found = [values.repeat * number for number in found[:3]] + found[3:]
            _combine(counts, found, codes, moments)
        if values.implied_zeros:
            codes[0] += values.implied_zeros
            _combine(0, [values.implied_zeros, 0.0, 0.0, 0.0, 0.0], codes, moments)


def _combine(counts: IntArray | int, found: list[float], codes: IntArray, moments: FloatArray) -> None:
    """Add counts and moments to others, in place."""
    codes += counts
    count, total, squares, low, high = found
    moments[0] += count
    moments[1] += total
    moments[2] += squares
    moments[3] = min(moments[3], low)
    moments[4] = max(moments[4], high)


def _measure_block(piece: torch.Tensor) -> _Measured:
    """Counts and moments of one piece of 1 to `BLOCK` elements; values that are rare go the exact way."""
    single, double, exact = _as_floats(piece)
    low, high = float(np.minimum.reduce(exact)), float(np.maximum.reduce(exact))
    if not (low >= -_FLOAT32_MAX and high <= _FLOAT32_MAX):  # false for NaN too
        return _exactly(double)
    counts = _count_codes(single)
    coded_zero = int(counts[0] + counts[_SIGN])
    # Code 0 takes what lies below 1.5e-39 too, zero or not.
    if coded_zero and coded_zero != _count_zeros(exact):
        return _exactly(double)
    size = double.size
    squares = 0.0
    for start in range(0, size, SMALL):
        part = double[start : start + SMALL]
        squares += float(np.dot(part, part))
    return counts, [size, float(np.add.reduce(double)), squares, low, high]


def _as_floats(piece: torch.Tensor) -> tuple[_Float32Array, FloatArray, _Float32Array | FloatArray]:
    """The piece flat as float32 and as float64, and which of both holds the exact values."""
    if piece.is_complex():
        piece = piece.to(torch.complex128 if piece.dtype is torch.complex128 else torch.complex64).abs()
    size = piece.numel()
    double = _scratch.float64_array[:size]
    if piece.dtype is torch.float32 and piece.is_contiguous():
        single = piece.numpy().reshape(-1)
        np.copyto(double, single)
        return single, double, single
    single = _scratch.float32_array[:size]
    if piece.dtype in _WIDE:
        _scratch.float64[:size].view(piece.shape).copy_(piece)
        np.copyto(single, double, casting="same_kind")
        return single, double, double
    _scratch.float32[:size].view(piece.shape).copy_(piece)
    np.copyto(double, single)
    return single, double, single


def _count_codes(single: _Float32Array) -> IntArray:
    size = single.size
    codes = _scratch.codes_array[:size]
    np.right_shift(single.view(np.uint32), _CODE_SHIFT, out=codes)
    if size <= SMALL:
        return np.bincount(codes.view(np.int32), minlength=CODES)
    return torch.bincount(_scratch.codes[:size], minlength=CODES).numpy()


def _count_zeros(values: _Float32Array | FloatArray) -> int:
    is_zero = _scratch.is_zero[: values.size]
    np.equal(values, 0, out=is_zero)
    return int(np.count_nonzero(is_zero))


def _exactly(values: FloatArray) -> _Measured:
    """Counts and moments where NaN, Inf, or values beyond float32 at either end are about."""
    finite = values[np.isfinite(values)]
    single = np.clip(finite, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32)
    codes = (single.view(np.uint32) >> _CODE_SHIFT).astype(np.int64)
    codes[((codes & 0x7FF) == 0) & (finite != 0)] += 1
    counts = np.bincount(codes, minlength=CODES)
    counts[_NAN_CODE] += np.count_nonzero(np.isnan(values))
    counts[_POSITIVE_INF_CODE] += np.count_nonzero(values == math.inf)
    counts[_NEGATIVE_INF_CODE] += np.count_nonzero(values == -math.inf)
    if not finite.size:
        return counts, empty_moments().tolist()
    total, squares = float(finite.sum()), float(np.square(finite).sum())
    return counts, [finite.size, total, squares, float(finite.min()), float(finite.max())]
