"""Units: for each output feature of a module its range, and on how many samples it was flat.

A *unit* is one feature of the last dimension, or one channel of a convolution; a *sample* is a row or token of the one,
a whole image of the other. The smallest and the largest value of each unit answer nearly everything: a unit whose
largest z lies in the lower tail of its nonlinearity was flat on every sample. What shaped the code, measured with
torch 2.13 and NumPy 2.4 on one core (nanoseconds an element):

* `torch.aminmax(dim=0)` takes 8 to 600, `torch.amin` and `amax` 0.3 to 6, NumPy's two reductions 0.4 where rows are
  long, and 5 where they are short; so short rows are laid side by side first, and blocks stay in the cache;
* counting flat samples in whole would cost as much again; a strided subset of at most `COUNTED` samples is counted.
  Its stride shares no factor with any leading size, or it would meet the same positions of each sequence only.

On other devices than the CPU the same is computed there and fetched when somebody asks: nothing waits in a hook.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure import native
from instrument.measure.device import Devices
from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.slopes import Slopes, Tails
from instrument.measure.tensors import whole
from instrument.measure.units.on_device import tally_on_device
from instrument.measure.units.shape import COUNTED, SCALE_SAMPLE, cube_of, scale_steps, sides
from instrument.measure.units.tally import BoolArray, DeviceTally, UnitTally

__all__ = [
    "Extent",
    "extent_of",
    "living_rows",
    "rows_together",
    "tally_of_range",
    "tally_plain",
    "tally_rows",
    "tally_units",
    "zero_rows",
]

_Floats: TypeAlias = "npt.NDArray[Any]"
_Values: TypeAlias = Any
"""An array of float32 or float64, or a tensor of another type: both are sliced alike."""

_NATIVE = frozenset((torch.float32, torch.float64))

BLOCK = 131_072
"""Elements that are read twice while they lie in the cache."""

WIDTH = 2048
"""Elements a row should have, so that the calls of NumPy do not cost more than the elements."""

LONG = 128
"""Positions of an image from which on it is reduced by itself: NumPy is quick along rows that are long."""

COUNTED_IMAGES = 16
"""The same for images, of which every position is looked at."""

GLANCE = 8
"""Elements of each row of a gradient that are looked at first."""


class Extent(NamedTuple):
    """Range of each unit of one tensor: what a layer's output and the input of the nonlinearity behind it share."""

    samples: int
    """Samples seen."""

    low: FloatArray
    """Smallest value of each unit, float64 of shape (units,)."""

    high: FloatArray
    """Largest value of each unit, float64 of shape (units,)."""

    square_mean: float
    """Mean square of a strided sample of the values."""


def extent_of(tensor: torch.Tensor, axis: int) -> Extent:
    """Find the range of each unit of a tensor on the CPU; call it under `Unseen`.

    Args:
        tensor: As `whole` gives it, of shape (..., units, ...), with at least one element.
        axis: Dimension of the units; those before it are samples, those behind it positions within a sample.

    Returns:
        The ranges.
    """
    dense = _dense(tensor, axis)
    if dense is not None:
        return Extent(sides(tensor.shape, axis)[0], *native.ranges_of(*dense, scale_steps(*dense[1])))
    tensor = tensor.detach()
    values = _values(tensor, axis)
    samples, units, positions = values.shape
    if positions == 1:
        low, high, squares = _by_rows(values[:, :, 0])
    elif tensor.stride(axis) == 1:  # channels last
        low, high, squares = _by_rows(values.swapaxes(1, 2).reshape(samples * positions, units))
    elif positions < LONG:
        low, high, squares = _by_rows(values.reshape(samples, units * positions))
        low = np.minimum.reduce(low.reshape(units, positions), axis=1)
        high = np.maximum.reduce(high.reshape(units, positions), axis=1)
    else:
        low, high, squares = _by_positions(values)
    return Extent(samples, low.astype(np.float64), high.astype(np.float64), squares)


def _dense(tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, tuple[int, int, int]] | None:
    """What `native` can read, as so many samples, units and positions; of channels last, positions are samples."""
    samples, units, positions = cube = sides(tensor.shape, axis)
    if native.can_measure(tensor):
        return tensor, cube
    if not native.is_there() or positions == 1 or tensor.stride(axis) != 1:
        return None
    last = tensor.movedim(axis, -1)
    return (last, (samples * positions, units, 1)) if native.can_measure(last) else None


def tally_units(tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> UnitTally | DeviceTally:
    """Tally the units of one tensor; call it under `Unseen`.

    Args:
        tensor: Of any floating-point type, of shape (..., units, ...): z of a nonlinearity, or any output.
        axis: Dimension of the units; those before it are samples, those behind it positions within a sample, and a
            sample is flat where all its positions are.
        slopes: Where the nonlinearity is flat; without it, only ranges are found.

    Returns:
        The tally, or what will give it, for tensors on other devices.

    Raises:
        UnmeasurableError: The tensor has no such values; sparse, nested, integers, a shard.

    Example:
        >>> tally_units(torch.tensor([[1.0, 5.0], [2.0, 5.0]]), 1, None).high.tolist()
        [2.0, 5.0]
    """
    return tally_plain(whole(tensor), axis, slopes)


def tally_plain(
    tensor: torch.Tensor, axis: int, slopes: Slopes | None, known: Extent | None = None, devices: Devices | None = None
) -> UnitTally | DeviceTally:
    """The same of a tensor as `whole` gives it.

    Args:
        tensor: As `whole` gives it, or one that `native.can_read`.
        axis: As in `tally_units`.
        slopes: As in `tally_units`.
        known: Ranges of this very tensor, where they were found before.
        devices: What tallies of tensors on other devices travel to the host with.
    """
    function = slopes.function if slopes is not None else None
    if not tensor.numel():
        return UnitTally.empty(tensor.shape[axis], function)
    if not tensor.is_cpu:
        return tally_on_device(tensor, axis, slopes, devices)
    extent = known if known is not None else extent_of(tensor, axis)
    units, low, high = extent.low.size, extent.low, extent.high
    if slopes is None:
        return tally_of_range(extent)
    never_flat = _nothing(units)[1]
    if slopes.is_piecewise_linear:
        never_flat = (low > slopes.flat.low) & (high < slopes.flat.high)
    counted, flat = _flat_samples(tensor, axis, slopes.flat)
    dead_flat = (high <= slopes.dead.low) | (low >= slopes.dead.high)
    torn = np.flatnonzero((low <= slopes.dead.low) & (high >= slopes.dead.high) & ~dead_flat & (flat == counted))
    if torn.size:  # in one tail or the other, as far as is known: the values between must be looked for
        dead_flat[torn] = _is_flat(_floats(_values(tensor.detach(), axis)[:, torn]), slopes.dead).all(axis=0)
    return UnitTally(function, extent.samples, 1, low, high, counted, flat, dead_flat, never_flat, extent.square_mean)


def tally_of_range(extent: Extent, batches: int = 1) -> UnitTally:
    """The tally of units of which the range is known and nothing else; those of as many units share their counts.

    Args:
        extent: The range.
        batches: Calls of the module that it is of.
    """
    nowhere, never = _nothing(extent.low.size)
    tally = object.__new__(UnitTally)  # a frozen dataclass sets its fields by one slow call each
    tally.__dict__.update(
        function=None, samples=extent.samples, batches=batches, low=extent.low, high=extent.high, counted=0,
        flat=nowhere, dead_flat=never, never_flat=never, square_mean=extent.square_mean, witness="activations",
    )  # fmt: skip
    return tally


@functools.lru_cache(maxsize=64)
def _nothing(units: int) -> tuple[IntArray, BoolArray]:
    """No sample, and no unit; nobody may change them."""
    counts, flags = np.zeros(units, np.int64), np.zeros(units, np.bool_)
    counts.flags.writeable = flags.flags.writeable = False
    return counts, flags


def tally_rows(gradient: torch.Tensor, axis: int, samples: int) -> UnitTally | DeviceTally:
    """Tally which rows of a weight's gradient are exactly zero; call it under `Unseen`.

    Behind a ReLU that never fires stands an exact zero, so the row is as good a witness as the activations. A gradient
    that is zero in whole says nothing about units: the layer was frozen, not reached, or lies before a dead one.

    Args:
        gradient: Of a weight matrix or kernel.
        axis: Dimension of the units: 0, or 1 for transposed convolutions.
        samples: Samples that the gradient is of, as far as is known; at least 1.

    Returns:
        A tally with the witness "gradient rows" of one batch, or an empty one; or what will give it.

    Raises:
        UnmeasurableError: The gradient has no such values; sparse, a shard.

    Example:
        >>> tally_rows(torch.tensor([[0.0, 0.0], [0.0, 0.1]]), 0, 64).dead_flat.tolist()
        [True, False]
    """
    if axis == 0 and native.can_read(gradient):
        zero = native.zero_rows_of(gradient)
        return living_rows(len(gradient), samples) if zero is None else _row_tally(~zero, samples)
    rows = whole(gradient).movedim(axis, 0).flatten(1)
    if not rows.is_cpu:
        return DeviceTally(rows.ne(0).any(1), samples, lambda alive: _row_tally(alive, samples))
    # Nearly every row shows within a few elements that it is not zero.
    glance = rows[:, :: max(1, rows.shape[1] // GLANCE)][:, :GLANCE]
    alive = np.logical_or.reduce(_floats(_host(glance)).T != 0, axis=0)
    doubtful = np.flatnonzero(~alive)
    if doubtful.size:
        alive[doubtful] = np.logical_or.reduce(_floats(_host(rows)[doubtful]) != 0, axis=1)
    return _row_tally(alive, samples)


def rows_together(gradients: Sequence[torch.Tensor], samples: Sequence[int], devices: Devices) -> list[DeviceTally]:
    """`tally_rows` of gradients of one type on one device, in one launch; call it under `Unseen`.

    Args:
        gradients: As `Devices.can_find_rows` asks for; units are their first dimension.
        samples: Samples that each is of, at least 1.
        devices: What travels with the tallies to the host.
    """
    return [
        DeviceTally(columns, seen, functools.partial(_rows_of_columns, samples=seen))
        for columns, seen in zip(devices.find_rows(gradients), samples, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def living_rows(units: int, samples: int) -> UnitTally:
    """The tally of a gradient without a row of zeros, as nearly all are; those of as many rows share their arrays."""
    low, high, flat, never = _alive(units)
    return UnitTally(None, samples, 1, low, high, 1, flat, never, never, math.nan, "gradient rows")


@functools.lru_cache(maxsize=64)
def zero_rows(units: int) -> UnitTally:
    """The tally of a gradient that is zero in whole, which says nothing; those of as many rows are one."""
    return UnitTally.empty(units, None, "gradient rows")


@functools.lru_cache(maxsize=64)
def _alive(units: int) -> tuple[FloatArray, FloatArray, IntArray, BoolArray]:
    """Nothing is known of the range of any unit, and none was flat; nobody may change them."""
    low = np.full(units, -math.inf)
    arrays = low, -low, *_nothing(units)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _rows_of_columns(columns: FloatArray, samples: int) -> UnitTally:
    return _row_tally(columns[0] > 0, samples)


def _row_tally(alive: BoolArray, samples: int) -> UnitTally:
    """The tally of one gradient, of which rows are alive."""
    if not alive.any():
        return zero_rows(alive.size)
    if alive.all():
        return living_rows(alive.size, samples)
    low = np.full(alive.size, -math.inf)
    flat = np.logical_not(alive)
    never_flat = np.zeros(alive.size, np.bool_)
    return UnitTally(None, samples, 1, low, -low, 1, flat.astype(np.int64), flat, never_flat, math.nan, "gradient rows")


def _values(tensor: torch.Tensor, axis: int) -> _Values:
    """The same as `_host` gives it."""
    return _host(cube_of(tensor, axis))


def _host(tensor: torch.Tensor) -> _Values:
    """An array where NumPy has the type, since its slices cost a tenth; else the tensor, to be converted by pieces."""
    return tensor.numpy() if tensor.dtype in _NATIVE else tensor


def _floats(values: _Values) -> _Floats:
    """An array of what is one, or is converted to float32."""
    return values.float().numpy() if isinstance(values, torch.Tensor) else values


def _by_rows(rows: _Values) -> tuple[_Floats, _Floats, float]:
    """Smallest and largest value of each column, and the mean square of a sample of the values."""
    count, width = rows.shape
    height = max(1, BLOCK // width)
    low, high = _extremes(_floats(rows[:height]))
    for start in range(height, count, height):
        block_low, block_high = _extremes(_floats(rows[start : start + height]))
        np.minimum(low, block_low, out=low)
        np.maximum(high, block_high, out=high)
    every = max(1, count // 8)
    across = math.ceil(width * math.ceil(count / every) / SCALE_SAMPLE)
    return low, high, _square_mean(rows[::every, ::across])


def _extremes(block: _Floats) -> tuple[_Floats, _Floats]:
    """Smallest and largest value of each column of one block; short rows are laid side by side."""
    count, width = block.shape
    fold = min(WIDTH // width, count) if block.flags.c_contiguous else 1
    if fold < 2:
        return np.minimum.reduce(block, axis=0), np.maximum.reduce(block, axis=0)
    folded = block[: count - count % fold].reshape(-1, fold * width)
    low = np.minimum.reduce(np.minimum.reduce(folded, axis=0).reshape(fold, width), axis=0)
    high = np.maximum.reduce(np.maximum.reduce(folded, axis=0).reshape(fold, width), axis=0)
    if count % fold:
        rest = block[count - count % fold :]
        np.minimum(low, np.minimum.reduce(rest, axis=0), out=low)
        np.maximum(high, np.maximum.reduce(rest, axis=0), out=high)
    return low, high


def _by_positions(values: _Values) -> tuple[_Floats, _Floats, float]:
    """Smallest and largest value of each channel of images with many positions, sample by sample."""
    lows, highs = [], []
    for image in values:
        image = _floats(image)
        lows.append(np.minimum.reduce(image, axis=1))
        highs.append(np.maximum.reduce(image, axis=1))
    count, units, positions = values.shape
    every = max(1, count // 8)
    across = math.ceil(units * positions * math.ceil(count / every) / SCALE_SAMPLE)
    sample = values[::every, :, ::across]
    return np.minimum.reduce(lows), np.maximum.reduce(highs), _square_mean(sample)


def _square_mean(sample: _Values) -> float:
    exact = _floats(sample).astype(np.float64).reshape(-1)
    with np.errstate(all="ignore"):  # NaN and Inf may be among them
        return float(np.dot(exact, exact)) / exact.size


def _flat_samples(tensor: torch.Tensor, axis: int, tails: Tails) -> tuple[int, IntArray]:
    """How many samples were looked at, and on how many of them each unit was flat."""
    leading = tensor.shape[:axis]
    samples, _, positions = cube = sides(tensor.shape, axis)
    step = math.ceil(samples / (COUNTED if positions == 1 else COUNTED_IMAGES))
    while step > 1 and any(math.gcd(step, size) != 1 for size in leading):
        step += 1
    if native.can_measure(tensor):
        flat = native.flat_of(tensor, cube, step, tails.low, tails.high)
        return math.ceil(samples / step), flat
    is_flat = _is_flat(_floats(_values(tensor.detach(), axis)[::step]), tails)
    return len(is_flat), np.add.reduce(is_flat.view(np.uint8), axis=0, dtype=np.uint8).astype(np.int64)


def _is_flat(values: _Floats, tails: Tails) -> BoolArray:
    """Whether all positions of a sample lie in the tails, of shape (s, u)."""
    is_single = values.shape[2] == 1
    if tails.high == math.inf:
        tops = values[:, :, 0] if is_single else np.maximum.reduce(values, axis=2)
        return tops <= tails.low
    if tails.low == -math.inf:
        bottoms = values[:, :, 0] if is_single else np.minimum.reduce(values, axis=2)
        return bottoms >= tails.high
    is_flat = (values <= tails.low) | (values >= tails.high)
    return is_flat[:, :, 0] if is_single else np.logical_and.reduce(is_flat, axis=2)
