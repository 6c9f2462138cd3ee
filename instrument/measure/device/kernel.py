"""Triton kernels that read values once and make codes and moments of them; imported only where Triton is there.

Both keep counts of all codes and the moments of a program's blocks in registers and add them to accumulators in
device memory once, at the end. NaN and Inf are left out of the moments by a mask that costs nothing beside the read.
They give the codes of `instrument.measure.cpu`, value for value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["accumulate_segments", "accumulate_values"]

_BLOCK = 4096
_SMALL_BLOCK = 1024
_MOST_PROGRAMS = 1024
"""Programs a launch: several for each multiprocessor of any device sold today, and few enough that their atomic adds
do not count beside the read."""

_PIECE = 1 << 30
"""Elements a launch, so that places and counts within one fit into 32 bits."""

_CODES: tl.constexpr = tl.constexpr(4096)
_NAN_CODE: tl.constexpr = tl.constexpr(0x7FC)
"""All NaN count here, whatever their bits."""

_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32: what lies beyond, in float64, counts in the last finite code."""


@triton.jit
def _add_block(values, mask, codes, count, total, squares, low, high, IS_BFLOAT16: tl.constexpr):
    """Codes and moments of a block, added to those of the blocks before."""
    if IS_BFLOAT16:  # comes as int16: its bits are the upper half of a float32
        exact = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        exact = values.to(tl.float64)
    is_finite = mask & (tl.abs(exact) < float("inf"))
    clipped = tl.minimum(tl.maximum(exact, -_LARGEST), _LARGEST)
    single = tl.where(is_finite, clipped, exact).to(tl.float32)
    bits = single.to(tl.int32, bitcast=True)
    code = (bits >> 20) & 0xFFF
    # Codes 0 and 2048 hold zeros alone; what is too small for the next code counts there.
    code = tl.where(((code & 0x7FF) == 0) & (exact != 0.0), code + 1, code)
    code = tl.where(exact != exact, _NAN_CODE, code)
    codes += tl.histogram(code, _CODES, mask=mask)
    finite = tl.where(is_finite, exact, 0.0)
    count += tl.sum(is_finite.to(tl.int64), 0)
    total += tl.sum(finite, 0)
    squares += tl.sum(finite * finite, 0)
    low = tl.minimum(low, tl.min(tl.where(is_finite, exact, float("inf")), 0))
    high = tl.maximum(high, tl.max(tl.where(is_finite, exact, float("-inf")), 0))
    return codes, count, total, squares, low, high


@triton.jit
def _add_to_accumulators(codes_out, moments_out, codes, count, total, squares, low, high):
    """One atomic operation for each code that occurs and for each moment."""
    slots = tl.arange(0, _CODES)
    tl.atomic_add(codes_out + slots, codes.to(tl.int64), mask=codes > 0)
    tl.atomic_add(moments_out, count.to(tl.float64))
    tl.atomic_add(moments_out + 1, total)
    tl.atomic_add(moments_out + 2, squares)
    tl.atomic_min(moments_out + 3, low)
    tl.atomic_max(moments_out + 4, high)


@triton.jit
def _values_kernel(values, codes_out, moments_out, size, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr):
    """Every n-th block of one tensor."""
    codes = tl.zeros((_CODES,), tl.int32)
    count = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), float("-inf"), tl.float64)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        places = first + tl.arange(0, BLOCK)
        mask = places < size
        read = tl.load(values + places, mask=mask, other=0)
        codes, count, total, squares, low, high = _add_block(
            read, mask, codes, count, total, squares, low, high, IS_BFLOAT16
        )
    _add_to_accumulators(codes_out, moments_out, codes, count, total, squares, low, high)


@triton.jit
def _segments_kernel(values, starts, rows_out, width, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr):
    """One of several tensors that stand one behind the other; its row has codes first and moments behind them."""
    segment = tl.program_id(0)
    start = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    codes = tl.zeros((_CODES,), tl.int32)
    count = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), float("-inf"), tl.float64)
    for first in range(start, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        mask = places < end
        read = tl.load(values + places, mask=mask, other=0)
        codes, count, total, squares, low, high = _add_block(
            read, mask, codes, count, total, squares, low, high, IS_BFLOAT16
        )
    row = rows_out + segment.to(tl.int64) * width
    moments_out = (row + _CODES).to(tl.pointer_type(tl.float64), bitcast=True)
    _add_to_accumulators(row, moments_out, codes, count, total, squares, low, high)


_values: Any = _values_kernel
_segments: Any = _segments_kernel
"""Triton's decorator leaves functions that are subscripted by a grid, which no type describes."""


def accumulate_values(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Add the values of a tensor to accumulators on its device; nothing waits.

    Args:
        values: Contiguous, of shape (n,), float16, bfloat16, float32 or float64.
        codes: Int64 of shape (4096,).
        moments: Float64 of shape (5,): count, sum, sum of squares, minimum, maximum.
    """
    is_bfloat16 = values.dtype is torch.bfloat16
    values = values.view(torch.int16) if is_bfloat16 else values
    for piece in values.split(_PIECE) if values.numel() else ():
        programs = min(triton.cdiv(piece.numel(), _BLOCK), _MOST_PROGRAMS)
        _values[(programs,)](piece, codes, moments, piece.numel(), IS_BFLOAT16=is_bfloat16, BLOCK=_BLOCK)


def accumulate_segments(values: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> None:
    """Add tensors that stand one behind the other to a row of accumulators each, in one launch.

    Args:
        values: All of them, contiguous, of shape (n,), float16, bfloat16, float32 or float64.
        starts: Where each begins, and where the last ends: int64 of shape (tensors + 1,), on the same device.
        rows: Int64 of shape (tensors, width) with at least 4101 columns: codes, and moments in the bits of float64.
    """
    if rows.shape[0]:
        is_bfloat16 = values.dtype is torch.bfloat16
        values = values.view(torch.int16) if is_bfloat16 else values
        grid = (rows.shape[0],)
        _segments[grid](values, starts, rows, rows.stride(0), IS_BFLOAT16=is_bfloat16, BLOCK=_SMALL_BLOCK)
