"""Measuring on the CPU: blocks that stay in the cache, through scratch that is allocated once a thread.

Where `instrument.measure.native` is there, it makes counts and moments of what is float32 or bfloat16, or is brought to
that a block at a time. The rest is what NumPy and torch do as well as they can.

What shaped it, measured on one core with torch 2.13 and NumPy 2.4 (nanoseconds an element of 10 million):

* blocks of 131,072 elements take 1.6 in all, of 32,704 take 2.2 and of 16,384 take 2.8: the calls of NumPy and
  torch are dearer than they look, and 1 MB of float64 scratch still lies in a second-level cache of today;
* NumPy computes on the calling thread only; `numpy.dot` wakes no other up to 10,000 elements;
* `torch.bincount` of int32 takes 1.1, `numpy.bincount`, which wants int64, 1.4; below a few thousand elements
  the shorter call of NumPy wins;
* sharing the pieces of a large tensor with threads of our own gained nothing on two cores, 2.1 in place of 1.8: a piece
  is a dozen operations of 20 to 100 us, and after each the threads wait for one another's interpreter lock;
* inside an operation of 32,768 elements or more torch wakes its own threads, and waits for them: on a busy machine
  `torch.bincount` of a block took 0.1 ms with one thread and 12 ms with two. A forked child waits for ever. So torch
  is given less than that at a time wherever it may use threads, for 0.03 ms a block;
* `count_nonzero` branches on each value, 4.6 for the output of a ReLU; compare and count takes 0.1.

Sums are of float64 copies: sums of squares in float32 overflow from 1.8e19 on, and a variance far from zero
loses all its digits.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure import native
from instrument.measure.histogram import pure_codes, spread
from instrument.measure.narrow import MANY, NARROW, measure_patterns
from instrument.measure.parallel import PART, each, parts_of
from instrument.measure.sketch import CODES, FloatArray, IntArray, Sketch, empty_moments
from instrument.measure.tensors import Values, chunks, in_memory_order

__all__ = ["BLOCK", "FLOAT32_MAX", "accumulate_cpu", "as_single", "count_numbers", "measure_cpu", "measure_exactly"]

BLOCK = 131_072
"""Elements in a block."""

SMALL = 8192
"""Up to here `numpy.bincount` is used; also the length of the pieces that `numpy.dot` is given."""

GRAIN = 32_768
"""Elements from which on torch wakes its threads inside an operation: `at::internal::GRAIN_SIZE`."""

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

_QUIET = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16))
"""Types whose sums and casts cannot overflow, so that NumPy has nothing to warn of; silencing it takes 1.5 us."""

FLOAT32_MAX = float(np.finfo(np.float32).max)
_NAN_CODE, _POSITIVE_INF_CODE, _NEGATIVE_INF_CODE = 0x7FC, 0x7F8, 0xFF8
_SIGN = 2048

_CODE_SHIFT = np.uint32(20)

_Float32Array: TypeAlias = "npt.NDArray[np.float32]"
_Measured: TypeAlias = "tuple[IntArray, list[float], bool]"
"""Counts of codes; count, sum, sum of squares, minimum and maximum of the finite values; whether all are finite."""


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


def measure_cpu(values: Values, sample_above: int = 0) -> Sketch:
    """Measure the values of a tensor on the CPU; call it under `Unseen`.

    Args:
        values: The values, on the CPU.
        sample_above: Elements beyond which codes are counted of about as many alone; 0 means never. Up to `SMALL`
            elements, and where patterns are counted, it would save nothing.

    Returns:
        The sketch.
    """
    if sample_above and values.tensor.numel() > max(sample_above, SMALL) and not _has_patterns(values.tensor):
        return _measure_sampled(values, _stride(values.tensor, sample_above))
    if values.repeat == 1 and not values.implied_zeros and 0 < values.tensor.numel() <= PART:
        tensor = in_memory_order(values.tensor)
        if not _has_patterns(tensor) and native.can_measure(tensor):
            return native.sketch_of(tensor)
        if tensor.numel() <= BLOCK:
            return Sketch.from_dense(*_measure_block(values.tensor))
    codes, moments = np.zeros(CODES, np.int64), empty_moments()
    accumulate_cpu(values, codes, moments)
    return Sketch.from_dense(codes, moments.tolist())


def _has_patterns(tensor: torch.Tensor) -> bool:
    """Whether counting bit patterns is the cheapest way."""
    return tensor.dtype in NARROW and tensor.numel() > MANY


def _stride(tensor: torch.Tensor, sample_above: int) -> int:
    """Every how many elements codes are counted; a step that divides a row would visit the same few columns."""
    stride = math.ceil(tensor.numel() / sample_above)
    while any(math.gcd(stride, size) != 1 for size in tensor.shape):
        stride += 1
    return stride


def _measure_sampled(values: Values, stride: int) -> Sketch:
    codes, moments = np.zeros(CODES, np.int64), empty_moments()
    accumulate_cpu(values, codes, moments, stride)
    return dataclasses.replace(Sketch.from_dense(codes, moments.tolist()), histogram_share=1 / stride)


def accumulate_cpu(values: Values, codes: IntArray, moments: FloatArray, stride: int = 1) -> None:
    """Add the values of a tensor to counts of codes and to moments; call it under `Unseen`.

    Args:
        values: The values, on the CPU.
        codes: Int64 of shape (4096,), added to in place.
        moments: Float64 of shape (5,), combined in place: count, sum, sum of squares, minimum, maximum.
        stride: Every how many elements codes are counted, as if the others were spread alike; zeros, NaN, Inf and
            moments are of all.
    """
    for counts, found in _pieces(values.tensor, stride):
        if values.repeat != 1:
            counts *= values.repeat
            found = [values.repeat * number for number in found[:3]] + found[3:]
        _combine(counts, found, codes, moments)
    if values.implied_zeros:
        codes[0] += values.implied_zeros
        _combine(0, [values.implied_zeros, 0.0, 0.0, 0.0, 0.0], codes, moments)


def _pieces(tensor: torch.Tensor, stride: int) -> Iterator[tuple[IntArray, list[float]]]:
    """Counts and moments of each piece of a tensor."""
    tensor = in_memory_order(tensor)
    if stride == 1 and _has_patterns(tensor):
        yield measure_patterns(tensor)
        return
    if native.can_measure(tensor):
        yield from each(native.counts_of, parts_of(tensor)) if stride == 1 else [native.counts_of(tensor, stride)]
        return
    for piece in chunks(tensor, BLOCK):
        yield _measure_block(piece, stride)[:2]


def _combine(counts: IntArray | int, found: list[float], codes: IntArray, moments: FloatArray) -> None:
    """Add counts and moments to others, in place."""
    codes += counts
    count, total, squares, low, high = found
    moments[0] += count
    moments[1] += total
    moments[2] += squares
    moments[3] = min(moments[3], low)
    moments[4] = max(moments[4], high)


def _measure_block(piece: torch.Tensor, stride: int = 1) -> _Measured:
    """Counts and moments of one piece of 1 to `BLOCK` elements."""
    if piece.dtype in _QUIET:
        return _measure_floats(*_as_floats(piece), stride)
    with np.errstate(all="ignore"):  # sums and casts may overflow, which is what they are to do
        return _measure_floats(*_as_floats(piece), stride)


def _measure_floats(single: _Float32Array, exact: _Float32Array | FloatArray, stride: int) -> _Measured:
    """Counts and moments; values that are rare go the exact way."""
    if exact is single and native.is_there():
        return *native.counts_of_array(single, stride), False
    low, high = float(np.minimum.reduce(exact)), float(np.maximum.reduce(exact))
    if not (low >= -FLOAT32_MAX and high <= FLOAT32_MAX):  # false for NaN too
        return measure_exactly(exact)
    sample = exact[::stride]
    counts = _count_codes(single if stride == 1 else np.ascontiguousarray(single[::stride]))
    coded_zero = int(counts[0] + counts[_SIGN])
    # Code 0 takes what lies below 1.5e-39 too, zero or not.
    if coded_zero and coded_zero != _count_zeros(sample):
        return measure_exactly(exact)
    if stride > 1:
        zeros = _count_zeros(exact)
        spread_out = spread(counts, zeros, exact.size - zeros)
        if spread_out is None:
            return measure_exactly(exact)
        counts = spread_out
    double = _scratch.float64_array[: single.size]
    if exact is single:
        np.copyto(double, single)
    return counts, [double.size, float(np.add.reduce(double)), _sum_of_squares(double), low, high], True


def _dots(first: FloatArray, second: FloatArray) -> FloatArray:
    """Stands for `numpy.vecdot` where there is none, before NumPy 2: a call a row, which is 13 us a block dearer."""
    return np.array([np.dot(a, b) for a, b in zip(first, second, strict=True)])


_dot_of_rows: Callable[[FloatArray, FloatArray], FloatArray] = getattr(np, "vecdot", _dots)


def _sum_of_squares(values: FloatArray) -> float:
    whole = values.size // SMALL * SMALL
    total = float(np.dot(values[whole:], values[whole:]))
    if whole:
        rows = values[:whole].reshape(-1, SMALL)
        total += sum(_dot_of_rows(rows, rows).tolist())
    return total


def _as_floats(piece: torch.Tensor) -> tuple[_Float32Array, _Float32Array | FloatArray]:
    """The piece flat as float32, and as what holds its exact values: the same, or float64 in scratch."""
    if piece.is_complex():
        piece = piece.to(torch.complex128 if piece.dtype is torch.complex128 else torch.complex64).abs()
    if piece.dtype is torch.float32 and piece.is_contiguous():
        single = piece.numpy().reshape(-1)
        return single, single
    size = piece.numel()
    if size <= SMALL and piece.dtype in NARROW:  # 3 us less than copying into scratch
        single = piece.float().numpy().reshape(-1)
        return single, single
    single = _scratch.float32_array[:size]
    if piece.dtype in _WIDE:
        double = _scratch.float64_array[:size]
        _copy_flat(piece, _scratch.float64[:size])
        np.copyto(single, double, casting="same_kind")
        return single, double
    _copy_flat(piece, _scratch.float32[:size])
    return single, single


def _copy_flat(piece: torch.Tensor, flat: torch.Tensor) -> None:
    """Copy a piece without waking torch's threads.

    Args:
        piece: Of any shape and type.
        flat: Where to, contiguous and with as many elements, of shape (n,).
    """
    if flat.numel() < GRAIN or torch.get_num_threads() == 1 or piece.dim() != 1:
        flat.view(piece.shape).copy_(piece)
        return
    for start in range(0, flat.numel(), GRAIN - 1):
        flat[start : start + GRAIN - 1].copy_(piece[start : start + GRAIN - 1])


def as_single(flat: torch.Tensor) -> torch.Tensor:
    """Values of shape (n,) as float32, themselves where they are; without waking torch's threads."""
    if flat.dtype is torch.float32:
        return flat
    single = torch.empty(flat.shape, dtype=torch.float32)
    _copy_flat(flat, single)
    return single


def count_numbers(numbers: torch.Tensor, length: int) -> IntArray:
    """How often each number occurs, without waking torch's threads.

    Args:
        numbers: Int32 of shape (n,), each from 0 to below `length`.
        length: Length of the counts.

    Returns:
        Int64 of shape (length,).
    """
    if numbers.numel() < GRAIN or torch.get_num_threads() == 1:
        return torch.bincount(numbers, minlength=length).numpy()
    counts = np.zeros(length, np.int64)
    for piece in numbers.split(GRAIN - 1):
        counts += torch.bincount(piece, minlength=length).numpy()
    return counts


def _count_codes(single: _Float32Array) -> IntArray:
    size = single.size
    if size <= SMALL:
        return np.bincount((single.view(np.uint32) >> _CODE_SHIFT).astype(np.int64), minlength=CODES)
    np.right_shift(single.view(np.uint32), _CODE_SHIFT, out=_scratch.codes_array[:size])
    return count_numbers(_scratch.codes[:size], CODES)


def _count_zeros(values: _Float32Array | FloatArray) -> int:
    is_zero = _scratch.is_zero[: values.size]
    np.equal(values, 0, out=is_zero)
    return int(np.count_nonzero(is_zero))


def measure_exactly(exact: _Float32Array | FloatArray) -> _Measured:
    """Counts and moments where NaN, Inf, or values beyond float32 at either end are about."""
    with np.errstate(all="ignore"):
        values = exact.astype(np.float64)
        finite = values[np.isfinite(values)]
        single = np.clip(finite, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)
        counts = np.bincount(pure_codes(single, finite), minlength=CODES)
        counts[_NAN_CODE] += np.count_nonzero(np.isnan(values))
        counts[_POSITIVE_INF_CODE] += np.count_nonzero(values == math.inf)
        counts[_NEGATIVE_INF_CODE] += np.count_nonzero(values == -math.inf)
        if not finite.size:
            return counts, empty_moments().tolist(), False
        total, squares = float(finite.sum()), float(np.square(finite).sum())
    return counts, [finite.size, total, squares, float(finite.min()), float(finite.max())], False
