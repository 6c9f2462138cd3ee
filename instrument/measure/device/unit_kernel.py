"""Triton kernels that tell what units did and which rows of gradients are zero; imported only where Triton is there.

Operations of torch need eleven launches and three reads for a tally, and a copy of its own to the host. These need one
launch and one read, and add to columns that travel with the sketches.

* Where units lie side by side, as behind a linear layer, a program takes a block of units and a run of samples; each
  thread keeps the extremes of its own units, so that nothing is exchanged before the end;
* where the positions of a unit lie side by side, as in an image, a sample is flat where all of its positions are, so
  the positions of a few units are a block, and the samples follow one another;
* of a row of a gradient a few values are read, and more only while all of those were zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from instrument.measure.device.kernel import bits_of, kin_of, name_of, shared_out, unsigned_zero
from instrument.measure.slopes import NO_TAILS, Slopes
from instrument.measure.units.shape import SPACING

__all__ = ["find_rows", "row_table", "tally_positions", "tally_units"]

_WARPS = 8
_FEW_WARPS = 4
_BLOCK = 2048
"""Values of a block: eight for each thread. Blocks have one of three shapes, since a kernel is compiled for each."""

_SHORTEST = 1 << 15
_MOST_PROGRAMS = 528
"""Programs, about: four for each of the 132 multiprocessors of a large device."""

_ROWS = 32
_GLANCE = 64
"""Values of each row of a gradient that are read at once."""

_CHANGING = ("samples", "run")
"""Sizes that a last, smaller batch changes: another kernel for them would be compiled while the training waits."""

_SPACING: tl.constexpr = tl.constexpr(SPACING)


@triton.jit
def _values(read, KIND: tl.constexpr):
    """What was read as float32."""
    return bits_of(read, KIND).to(tl.float32, bitcast=True)


@triton.jit
def _add(
    read, mask, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND: tl.constexpr,
    IS_JUDGED: tl.constexpr,
):  # fmt: skip
    """Extremes and marks with those of a block, and what of it is flat, where that is judged.

    NaN, which `tl.minimum` passes over, is marked by a bit, and what is not dead by another.
    """
    value = _values(read, KIND)
    lows = tl.minimum(lows, tl.where(mask, value, float("inf")))
    highs = tl.maximum(highs, tl.where(mask, value, float("-inf")))
    marks |= ((value != value) & mask).to(tl.int32)
    is_flat = mask
    if IS_JUDGED:
        is_flat = ((value <= flat_low) | (value >= flat_high)) & mask
        is_alive = (((value <= dead_low) | (value >= dead_high)) == 0) & mask
        marks |= 2 * is_alive.to(tl.int32)
    return is_flat, lows, highs, marks


@triton.jit
def _add_samples(
    values, first, end, places, is_unit, units, lows, highs, marks, flat_low, flat_high, dead_low, dead_high,
    KIND: tl.constexpr, IS_JUDGED: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Four blocks of samples, whose reads are under way at the same time; marks count what is flat, by fours."""
    rows = first + tl.arange(0, SAMPLES)
    at = values + rows[:, None].to(tl.int64) * units + places[None, :]
    mask_0 = (rows < end)[:, None] & is_unit[None, :]
    mask_1 = (rows + SAMPLES < end)[:, None] & is_unit[None, :]
    mask_2 = (rows + 2 * SAMPLES < end)[:, None] & is_unit[None, :]
    mask_3 = (rows + 3 * SAMPLES < end)[:, None] & is_unit[None, :]
    step = tl.cast(units, tl.int64) * SAMPLES
    read_0 = tl.load(at, mask=mask_0, other=0)
    read_1 = tl.load(at + step, mask=mask_1, other=0)
    read_2 = tl.load(at + 2 * step, mask=mask_2, other=0)
    read_3 = tl.load(at + 3 * step, mask=mask_3, other=0)
    flat_0, lows, highs, marks = _add(
        read_0, mask_0, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND, IS_JUDGED
    )
    flat_1, lows, highs, marks = _add(
        read_1, mask_1, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND, IS_JUDGED
    )
    flat_2, lows, highs, marks = _add(
        read_2, mask_2, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND, IS_JUDGED
    )
    flat_3, lows, highs, marks = _add(
        read_3, mask_3, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND, IS_JUDGED
    )
    if IS_JUDGED:
        marks += 4 * (flat_0.to(tl.int32) + flat_1.to(tl.int32) + flat_2.to(tl.int32) + flat_3.to(tl.int32))
    return lows, highs, marks


@triton.jit
def _store(out, width, places, mask, low, high, square, nan, flat, alive, IS_JUDGED: tl.constexpr):
    """Add to the columns of units what was found of every one."""
    low, high = unsigned_zero(low), unsigned_zero(high)
    tl.atomic_min(out + places, low.to(tl.float64), mask=mask, sem="relaxed")
    tl.atomic_max(out + width + places, high.to(tl.float64), mask=mask, sem="relaxed")
    tl.atomic_add(out + 2 * width + places, square, mask=mask & (square != 0.0), sem="relaxed")
    tl.atomic_add(out + 3 * width + places, nan.to(tl.float64), mask=mask & (nan > 0), sem="relaxed")
    if IS_JUDGED:
        tl.atomic_add(out + 4 * width + places, flat.to(tl.float64), mask=mask & (flat > 0), sem="relaxed")
        tl.atomic_add(out + 5 * width + places, alive.to(tl.float64), mask=mask & (alive > 0), sem="relaxed")


@triton.jit(do_not_specialize=_CHANGING)
def _units_kernel(
    values, out, width, samples, units, run, flat_low, flat_high, dead_low, dead_high, KIND: tl.constexpr,
    IS_JUDGED: tl.constexpr, SAMPLES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """A block of units on a run of samples; units lie side by side."""
    places = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = places < units
    start = tl.program_id(1) * run
    end = tl.minimum(start + run, samples)
    lows = tl.full((SAMPLES, UNITS), float("inf"), tl.float32)
    highs = tl.full((SAMPLES, UNITS), float("-inf"), tl.float32)
    marks = tl.zeros((SAMPLES, UNITS), tl.int32)
    for first in range(start, end, 4 * SAMPLES):
        lows, highs, marks = _add_samples(
            values, first, end, places, is_unit, units, lows, highs, marks, flat_low, flat_high, dead_low, dead_high,
            KIND, IS_JUDGED, SAMPLES
        )  # fmt: skip
    square = tl.zeros((UNITS,), tl.float64)
    rows = tl.arange(0, SAMPLES) * _SPACING
    for first in range((start + _SPACING - 1) // _SPACING * _SPACING, end, SAMPLES * _SPACING):
        mask = (first + rows < end)[:, None] & is_unit[None, :]
        read = tl.load(values + (first + rows)[:, None].to(tl.int64) * units + places[None, :], mask=mask, other=0)
        exact = _values(read, KIND).to(tl.float64)
        square += tl.sum(exact * exact, 0)
    _store(
        out, width, places, is_unit, tl.min(lows, 0), tl.max(highs, 0), square, tl.max(marks & 1, 0),
        tl.sum(marks >> 2, 0), tl.max(marks & 2, 0), IS_JUDGED
    )  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def _positions_kernel(
    values, out, width, samples, units, positions, run, flat_low, flat_high, dead_low, dead_high, KIND: tl.constexpr,
    IS_JUDGED: tl.constexpr, UNITS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """A few units on a run of samples; the positions of a unit lie side by side."""
    places = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = places < units
    start = tl.program_id(1) * run
    end = tl.minimum(start + run, samples)
    columns = tl.arange(0, POSITIONS)
    lows = tl.full((UNITS, POSITIONS), float("inf"), tl.float32)
    highs = tl.full((UNITS, POSITIONS), float("-inf"), tl.float32)
    marks = tl.zeros((UNITS, POSITIONS), tl.int32)
    flat = tl.zeros((UNITS,), tl.int32)
    square = tl.zeros((UNITS,), tl.float64)
    for sample in range(start, end):
        number = tl.cast(sample, tl.int64)
        begins = (number * units + places) * positions
        steep = tl.zeros((UNITS, POSITIONS), tl.int32)
        for first in range(0, positions, POSITIONS):
            position = first + columns
            mask = is_unit[:, None] & (position < positions)[None, :]
            read = tl.load(values + begins[:, None] + position[None, :], mask=mask, other=0)
            is_flat, lows, highs, marks = _add(
                read, mask, lows, highs, marks, flat_low, flat_high, dead_low, dead_high, KIND, IS_JUDGED
            )
            steep |= ((is_flat == 0) & mask).to(tl.int32)
            if number % _SPACING == 0:
                exact = _values(read, KIND).to(tl.float64)
                square += tl.sum(exact * exact, 1)
        flat += 1 - tl.max(steep, 1)
    _store(
        out, width, places, is_unit, tl.min(lows, 1), tl.max(highs, 1), square, tl.max(marks & 1, 1), flat,
        tl.max(marks & 2, 1), IS_JUDGED
    )  # fmt: skip


@triton.jit
def _rows_kernel(kin, table, out, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A few rows of one gradient of many: which of them are not zero."""
    entry = table + 4 * tl.program_id(0)
    values = tl.load(entry).to(kin.dtype, bitcast=True)
    count = tl.load(entry + 1)
    length = tl.load(entry + 2)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    alive = (rows >= count).to(tl.int32)
    first = length * 0
    while (first < length) & (tl.min(alive, 0) == 0):
        mask = (alive == 0)[:, None] & (first + columns < length)[None, :]
        read = tl.load(values + rows[:, None] * length + (first + columns)[None, :], mask=mask, other=0)
        value = read if KIND == "float64" else _values(read, KIND)
        alive |= tl.max((value != 0.0).to(tl.int32), 1)
        first += COLUMNS
    tl.store(out + tl.load(entry + 3) + rows, alive.to(tl.float64), mask=rows < count)


_of_units: Any = _units_kernel
_of_positions: Any = _positions_kernel
_of_rows: Any = _rows_kernel
"""Triton's decorator leaves functions that are subscripted by a grid, which no type describes."""


def tally_units(values: torch.Tensor, samples: int, units: int, slopes: Slopes | None, out: torch.Tensor) -> None:
    """Add what units did to their columns, where units lie side by side; nothing waits.

    Args:
        values: Contiguous, of `samples` times `units` values, float16, bfloat16 or float32.
        samples: Samples, at least 1.
        units: Units, at least 1.
        slopes: Where the nonlinearity is flat; without it the columns of flat samples are left as they are.
        out: Float64 of shape (6, units), consecutive in its second dimension: the smallest value, the largest, the sum
            of squares of every `SPACING`th sample, whether one was NaN, the flat samples, and whether one was not dead.
    """
    across = next((side for side in (16, 64) if units <= side), 256)
    along = _BLOCK // across
    programs = -(-units // across)
    run = _run(samples, programs, across, along)
    grid = programs, -(-samples // run)
    sizes = (samples, units, run)
    _of_units[grid](kin_of(values), out, out.stride(0), *sizes, *_limits(slopes), **_kinds(values, slopes),
        SAMPLES=along, UNITS=across, num_warps=_WARPS)  # fmt: skip


def tally_positions(
    values: torch.Tensor, samples: int, units: int, positions: int, slopes: Slopes | None, out: torch.Tensor
) -> None:
    """The same where the positions of a unit lie side by side.

    Args:
        values: Contiguous, of shape (samples, units, positions), of one of those types.
        samples: Samples, at least 1.
        units: Units, at least 1.
        positions: Positions within a sample, at least 1; a sample is flat where all of them are.
        slopes: As in `tally_units`.
        out: As in `tally_units`.
    """
    # The side that leaves least room behind the last position, and of those the longest.
    along = min((1024, 256, 64), key=lambda side: -(-positions // side) * side)
    across = _BLOCK // along
    programs = -(-units // across)
    run = _run(samples, programs, across * positions, 1)
    grid = programs, -(-samples // run)
    sizes = (samples, units, positions, run)
    _of_positions[grid](kin_of(values), out, out.stride(0), *sizes, *_limits(slopes), **_kinds(values, slopes),
        UNITS=across, POSITIONS=along, num_warps=_WARPS)  # fmt: skip


def row_table(
    addresses: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], itemsize: int
) -> npt.NDArray[np.int64]:
    """The table by which rows of several gradients are looked at in one launch.

    Args:
        addresses: Where each gradient begins, of shape (n,).
        rows: Rows of each, of shape (n,).
        lengths: Values of a row of each, of shape (n,).
        itemsize: Bytes a value.

    Returns:
        Of shape (programs, 4): address of the first row, number of rows, their length, and the place of the first among
        all rows of all gradients.
    """
    owners, numbers = shared_out(-(-rows // _ROWS))
    starts = _ROWS * numbers
    begins = np.cumsum(rows) - rows
    left = np.minimum(rows[owners] - starts, _ROWS)
    lengths = lengths[owners]
    return np.stack((addresses[owners] + itemsize * starts * lengths, left, lengths, begins[owners] + starts), axis=1)


def find_rows(like: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """Find which rows of several gradients are not zero, in one launch; nothing waits.

    Args:
        like: Any of them, contiguous; all are of its type.
        table: As `row_table` makes it, on the device.
        out: Float64 of shape (rows of all,), set to 1.0 for rows with a value that is not zero and to 0.0 for others.
    """
    _of_rows[(table.shape[0],)](
        kin_of(like), table, out, KIND=name_of(like.dtype), ROWS=_ROWS, COLUMNS=_GLANCE, num_warps=_FEW_WARPS
    )


def _run(samples: int, programs: int, across: int, multiple: int) -> int:
    """Samples a program: enough to be worth its end, few enough to fill the device."""
    splits = max(1, min(-(-_MOST_PROGRAMS // programs), samples * across // _SHORTEST))
    samples = -(-samples // splits)
    return -(-samples // multiple) * multiple


def _limits(slopes: Slopes | None) -> tuple[float, float, float, float]:
    return (*slopes.flat, *slopes.dead) if slopes is not None else (*NO_TAILS, *NO_TAILS)


def _kinds(values: torch.Tensor, slopes: Slopes | None) -> dict[str, Any]:
    return {"KIND": name_of(values.dtype), "IS_JUDGED": slopes is not None}
