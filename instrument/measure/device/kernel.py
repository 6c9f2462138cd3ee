"""Triton kernels that read values once and make codes and moments of them; imported only where Triton is there.

A program measures a run of consecutive values and adds what it found to accumulators in device memory once, at the
end. They give the codes of `instrument.measure.cpu`, value for value, and moments summed in float64. What shaped it:

* `tl.histogram` of 4096 bins votes bit by bit and keeps 128 counters in each thread. On NVIDIA's devices counts lie in
  shared memory instead, one `red.shared` a value, of which the language knows nothing: that is a few lines of PTX,
  which reserve the counts where nothing else of the program lies. Elsewhere, and under the interpreter, `tl.histogram`
  counts;
* values are read in rows of 16 bytes, a row by a thread, so that sums and extremes of a row need no other thread;
* only what is left of a run behind its last whole block is read under a mask: a mask makes reads narrow;
* each program ends with an atomic operation for each code that it met, so a run is not to be short.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

__all__ = [
    "accumulate_runs", "accumulate_values", "bits_of", "kin_of", "name_of", "runs_of", "shared_out", "unsigned_zero"
]  # fmt: skip

_WARPS = 8
_ROW_BYTES = 16
_ROWS = 32 * _WARPS * 4
"""Rows of a block: four for each thread, whose reads are then under way at the same time; with two a large tensor of
float32 took 7 % longer."""

_FEW_ROWS = 32 * _WARPS
"""Rows of a block that is read with care, which takes more registers."""

_SHORTEST_RUN = 1 << 15
_MOST_RUNS = 396
"""Runs of one tensor: three programs for each of the 132 multiprocessors of a large device, which fill it."""

_REGISTERS = 80
"""Registers of a thread, at most, so that three programs find room on a multiprocessor."""

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_IS_SHARED = torch.version.hip is None and not _IS_INTERPRETED

_CODES: tl.constexpr = tl.constexpr(4096)
_NAN_CODE: tl.constexpr = tl.constexpr(0x7FC)
"""All NaN count here, whatever their bits."""

_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32: what lies beyond, in float64, counts in the last finite code."""

_LEAST: tl.constexpr = tl.constexpr(2.0**-129)
"""The least number of code 1; what lies between it and zero is of code 1 too, which is not what its bits say."""

_RESERVE: tl.constexpr = tl.constexpr("{ .shared .align 16 .b32 counts[4096]; mov.u32 $0, counts; }")
_CLEAR: tl.constexpr = tl.constexpr("st.shared.u32 [$1], 0; mov.u32 $0, 0;")
_COUNT: tl.constexpr = tl.constexpr("red.shared.add.u32 [$1], 1; mov.u32 $0, 0;")
_COUNT_SOME: tl.constexpr = tl.constexpr(
    "{ .reg .pred is_one; setp.ne.s32 is_one, $2, 0; @is_one red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }"
)
_READ: tl.constexpr = tl.constexpr("ld.shared.u32 $0, [$1];")


@triton.jit
def _new_counts(IS_SHARED: tl.constexpr):
    """Counts of all codes, at zero: their address in shared memory, or a tensor."""
    if IS_SHARED:
        zero = tl.program_id(0) * 0
        counts = tl.inline_asm_elementwise(_RESERVE, "=r,r", [zero], dtype=tl.int32, is_pure=False, pack=1)
    else:
        counts = tl.zeros((_CODES,), tl.int32)
    return _cleared(counts, IS_SHARED)


@triton.jit
def _cleared(counts, IS_SHARED: tl.constexpr):
    """The counts at zero; no thread may be counting meanwhile."""
    if IS_SHARED:
        slots = counts + 4 * tl.arange(0, _CODES)
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [slots], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
    else:
        counts = tl.zeros((_CODES,), tl.int32)
    return counts


@triton.jit
def bits_of(read, KIND: tl.constexpr):
    """The bits of what was read as float32."""
    if KIND == "bfloat16":  # its bits are the upper half of a float32
        return read.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return read.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _add_plainly(read, counts, total, squares, low, high, least, KIND: tl.constexpr, IS_SHARED: tl.constexpr):
    """A whole block of values, as if none were NaN, Inf or too small for the next code.

    What shows whether that is so comes along: a sum that is not finite, and the least magnitude that is not zero.
    """
    bits = bits_of(read, KIND)
    value = read if KIND == "float64" else bits.to(tl.float32, bitcast=True)
    if IS_SHARED:
        slots = counts + ((bits >> 18) & 0x3FFC)
        tl.inline_asm_elementwise(_COUNT, "=r,r", [slots], dtype=tl.int32, is_pure=False, pack=1)
    else:
        counts += tl.histogram(tl.ravel((bits >> 20) & 0xFFF), _CODES)
    exact = value.to(tl.float64)
    total += tl.sum(exact, 1)
    squares += tl.sum(exact * exact, 1)
    low = tl.minimum(low, tl.min(value, 1))
    high = tl.maximum(high, tl.max(value, 1))
    if KIND == "float64":
        least = tl.minimum(least, tl.min(tl.where(value == 0.0, float("inf"), tl.abs(value)), 1))
    else:  # twice the magnitude, less one: of zeros the largest number
        least = tl.minimum(least, tl.min((bits + bits - 1).to(tl.uint32, bitcast=True), 1))
    return counts, total, squares, low, high, least


@triton.jit
def _add_carefully(read, mask, counts, total, squares, low, high, KIND: tl.constexpr, IS_SHARED: tl.constexpr):
    """Some values of a block, whatever they are."""
    if KIND == "float64":
        value = read
        is_finite = tl.abs(value) < float("inf")
        clipped = tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST)
        bits = tl.where(is_finite, clipped, value).to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        is_tiny = (magnitude < 0x100000) & (value != 0.0)
    else:
        bits = bits_of(read, KIND)
        value = bits.to(tl.float32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        is_finite = magnitude < 0x7F800000
        is_tiny = (magnitude < 0x100000) & (magnitude != 0)
    # Codes 0 and 2048 hold zeros alone; what is too small for the next code counts there.
    code = ((bits >> 20) & 0xFFF) + is_tiny.to(tl.int32)
    code = tl.where(magnitude > 0x7F800000, _NAN_CODE, code)
    if IS_SHARED:
        tl.inline_asm_elementwise(
            _COUNT_SOME, "=r,r,r", [counts + 4 * code, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        counts += tl.histogram(tl.ravel(code), _CODES, mask=tl.ravel(mask))
    is_finite = is_finite & mask
    exact = tl.where(is_finite, value, 0.0).to(tl.float64)
    total += tl.sum(exact, 1)
    squares += tl.sum(exact * exact, 1)
    low = tl.minimum(low, tl.min(tl.where(is_finite, value, float("inf")), 1))
    high = tl.maximum(high, tl.max(tl.where(is_finite, value, float("-inf")), 1))
    return counts, total, squares, low, high


@triton.jit
def unsigned_zero(value):
    """A zero without a sign: Triton 3.2 orders extremes by their bits, and takes -0.0 for a number above zero."""
    return tl.where(value == 0.0, 0.0, value)


@triton.jit
def _measure_run(
    values, size, codes_out, moments_out, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FEW_ROWS: tl.constexpr, IS_SHARED: tl.constexpr,
):  # fmt: skip
    """Measure consecutive values and add what was found to the accumulators."""
    value_type: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    block: tl.constexpr = ROWS * COLUMNS
    counts = _new_counts(IS_SHARED)
    totals = tl.zeros((ROWS,), tl.float64)
    squares = tl.zeros((ROWS,), tl.float64)
    lows = tl.full((ROWS,), float("inf"), value_type)
    highs = tl.full((ROWS,), float("-inf"), value_type)
    least = tl.full((ROWS,), float("inf"), tl.float64) if KIND == "float64" else tl.full((ROWS,), 0xFFFFFFFF, tl.uint32)
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    whole = size // block * block
    for first in range(0, whole, block):
        read = tl.load(values + first + places)
        counts, totals, squares, lows, highs, least = _add_plainly(
            read, counts, totals, squares, lows, highs, least, KIND, IS_SHARED
        )
    total, square = tl.sum(totals, 0), tl.sum(squares, 0)
    low, high = tl.min(lows, 0), tl.max(highs, 0)
    is_plain = tl.abs(total) < float("inf")
    if KIND == "float64":
        is_plain = is_plain & (low >= -_LARGEST) & (high <= _LARGEST) & (tl.min(least, 0) >= _LEAST)
    else:
        is_plain = is_plain & (tl.min(least, 0) >= 0x1FFFFF)
    if not is_plain:
        if IS_SHARED:
            tl.debug_barrier()
        counts = _cleared(counts, IS_SHARED)
    # What is not plain is read again, with care; so is what is left behind the last whole block.
    few: tl.constexpr = FEW_ROWS * COLUMNS
    careful_totals = tl.zeros((FEW_ROWS,), tl.float64)
    careful_squares = tl.zeros((FEW_ROWS,), tl.float64)
    careful_lows = tl.full((FEW_ROWS,), float("inf"), value_type)
    careful_highs = tl.full((FEW_ROWS,), float("-inf"), value_type)
    few_places = tl.arange(0, FEW_ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for first in range(tl.where(is_plain, whole, 0), size, few):
        mask = few_places < size - first
        read = tl.load(values + first + few_places, mask=mask, other=0)
        counts, careful_totals, careful_squares, careful_lows, careful_highs = _add_carefully(
            read, mask, counts, careful_totals, careful_squares, careful_lows, careful_highs, KIND, IS_SHARED
        )
    total = tl.where(is_plain, total, 0.0) + tl.sum(careful_totals, 0)
    square = tl.where(is_plain, square, 0.0) + tl.sum(careful_squares, 0)
    low = tl.minimum(tl.where(is_plain, low, float("inf")), tl.min(careful_lows, 0))
    high = tl.maximum(tl.where(is_plain, high, float("-inf")), tl.max(careful_highs, 0))
    slots = tl.arange(0, _CODES)
    if IS_SHARED:
        tl.debug_barrier()
        counts = tl.inline_asm_elementwise(_READ, "=r,r", [counts + 4 * slots], dtype=tl.int32, is_pure=False, pack=1)
    tl.atomic_add(codes_out + slots, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    finite = tl.sum(tl.where((slots & 0x7F8) != 0x7F8, counts, 0), 0)
    tl.atomic_add(moments_out, finite.to(tl.float64), sem="relaxed")
    tl.atomic_add(moments_out + 1, total, sem="relaxed")
    tl.atomic_add(moments_out + 2, square, sem="relaxed")
    tl.atomic_min(moments_out + 3, unsigned_zero(low).to(tl.float64), sem="relaxed")
    tl.atomic_max(moments_out + 4, unsigned_zero(high).to(tl.float64), sem="relaxed")


@triton.jit
def _values_kernel(
    values, codes_out, moments_out, size, run, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FEW_ROWS: tl.constexpr, IS_SHARED: tl.constexpr,
):  # fmt: skip
    """One run of one tensor."""
    start = tl.program_id(0) * run
    _measure_run(
        values + start, tl.minimum(size - start, run), codes_out, moments_out, KIND, ROWS, COLUMNS, FEW_ROWS, IS_SHARED
    )


@triton.jit
def _runs_kernel(
    kin, table, rows_out, width, KIND: tl.constexpr, IS_ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FEW_ROWS: tl.constexpr, IS_SHARED: tl.constexpr,
):  # fmt: skip
    """One run of many tensors; a row of accumulators has codes first and moments behind them."""
    entry = table + 3 * tl.program_id(0)
    address = tl.load(entry)
    values = address.to(kin.dtype, bitcast=True)
    if IS_ALIGNED:
        values = tl.multiple_of(values, 16)
    row = rows_out + tl.load(entry + 2) * width
    moments_out = (row + _CODES).to(tl.pointer_type(tl.float64), bitcast=True)
    size = tl.load(entry + 1).to(tl.int32)
    _measure_run(values, size, row, moments_out, KIND, ROWS, COLUMNS, FEW_ROWS, IS_SHARED)


_values: Any = _values_kernel
_runs: Any = _runs_kernel
"""Triton's decorator leaves functions that are subscripted by a grid, which no type describes."""


def accumulate_values(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Add the values of a tensor to accumulators on its device; nothing waits.

    Args:
        values: Contiguous, of any shape, float16, bfloat16, float32 or float64; 2**30 at most, so that places fit into
            32 bits.
        codes: Int64 of shape (4096,).
        moments: Float64 of shape (5,): count, sum, sum of squares, minimum, maximum.
    """
    size = values.numel()
    if size:
        run = _run_length(size)
        _values[(-(-size // run),)](kin_of(values), codes, moments, size, run, **_options(values.dtype))


def runs_of(
    sizes: npt.NDArray[np.int64], addresses: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], itemsize: int
) -> npt.NDArray[np.int64]:
    """The table of runs by which several tensors are measured in one launch.

    Args:
        sizes: Elements of each tensor, at least 1, of shape (n,).
        addresses: Where each begins, of shape (n,).
        rows: Row of accumulators of each, of shape (n,).
        itemsize: Bytes an element.

    Returns:
        Of shape (runs, 3): address of the first value, number of values, and row of accumulators.
    """
    run = _run_length(int(sizes.sum()), 4)
    owners, numbers = shared_out(-(-sizes // run))
    starts = run * numbers
    sizes_left = np.minimum(sizes[owners] - starts, run)
    return np.stack((addresses[owners] + itemsize * starts, sizes_left, rows[owners]), axis=1)


def shared_out(programs: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of so many programs for each of several tensors: the tensor of each program, and its number among those."""
    owners = np.repeat(np.arange(programs.size), programs)
    return owners, np.arange(owners.size) - np.repeat(np.cumsum(programs) - programs, programs)


def accumulate_runs(like: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, is_aligned: bool) -> None:
    """Add runs of several tensors to the row of accumulators of each, in one launch; nothing waits.

    Args:
        like: Any of them; all are of its type.
        table: As `runs_of` makes it, on the device.
        rows: Int64 of shape (tensors, width) with at least 4101 columns: codes, and moments in the bits of float64.
        is_aligned: Whether all addresses are multiples of 16.
    """
    grid = (table.shape[0],)
    _runs[grid](kin_of(like), table, rows, rows.stride(0), IS_ALIGNED=is_aligned, **_options(like.dtype))


def _run_length(size: int, times: int = 1) -> int:
    """Elements a program: enough to be worth its end, and few enough to fill the device."""
    run = max(_SHORTEST_RUN, -(-size // (_MOST_RUNS * times)))
    return -(-run // _SHORTEST_RUN) * _SHORTEST_RUN


def kin_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels take it: the interpreter knows no bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 and _IS_INTERPRETED else tensor


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    """What kernels call a type."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _options(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "KIND": name_of(dtype),
        "ROWS": _ROWS,
        "FEW_ROWS": _FEW_ROWS,
        "COLUMNS": _ROW_BYTES // dtype.itemsize,
        "IS_SHARED": _IS_SHARED,
        "num_warps": _WARPS,
        **({"maxnreg": _REGISTERS} if _IS_SHARED else {}),
    }
