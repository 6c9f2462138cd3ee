"""Many small tensors measured together: one call of NumPy for all of them instead of a dozen for each.

What shaped it, measured on one core with torch 2.13 and NumPy 2.4:

* a tensor of a thousand elements takes 18 us by itself, of which 2 are its elements; in a batch of a few hundred it
  takes 5, the making of its sketch included;
* `flatten_dense_tensors` copies a small tensor in 0.45 us, where a call of its own for each takes 1 to 3; a clone,
  for what cannot be referred to until the batch is full, takes 1.3;
* counts of 4096 codes a tensor would mostly be zeros, and to look through them took longer than the elements. Codes
  that occur anywhere in the batch are numbered, a few hundred of them, and counts made of those; the numbers of the
  last batch are tried first.

Sums are made in the order in which NumPy adds up one tensor, so that a tensor measures alike in any company.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from instrument.measure.cpu import BLOCK, copy_flat, count_numbers, measure_exactly
from instrument.measure.custom_op import measure
from instrument.measure.device import CapturingError, Devices, LateNumber, edge_for
from instrument.measure.histogram import CODES, SIGN
from instrument.measure.sketch import IntArray, Sketch, merge_all
from instrument.measure.tensors import readable
from instrument.torch_private import Unseen, can_hide, flattened

__all__ = ["GROUP", "SMALL", "Batch", "Divided", "Later", "Pending", "Together", "measure_later", "measure_many"]

SMALL = 8192
"""Tensors of up to this many elements are measured together; a larger one is cheaper by itself."""

_TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Types whose values are exactly those of a float32."""

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_CODE_SHIFT = np.uint32(20)
GROUP = 1024
"""Tensors in a group, at most: each has counts of its own."""

_MOST_TOGETHER = 64
"""Small tensors on a GPU that one launch measures; their rows are as many."""

_MOST_NUMBERS = 1024
"""Numbered codes beyond which those that no longer occur are given up."""


def measure_many(tensors: Iterable[torch.Tensor]) -> list[Sketch | Exception]:
    """Measure several tensors; small ones together, for a few microseconds each.

    Args:
        tensors: As for `measure`. They may be made one by one: large ones are not held.

    Returns:
        For each tensor its sketch, which is that of `measure`, or the exception that `measure` raises.

    Example:
        >>> import torch
        >>> [sketch.count for sketch in measure_many([torch.ones(3), torch.zeros(2)])]
        [3, 2]
    """
    return [_found(item) for item in measure_later(tensors)]


def _found(item: Sketch | Pending | Exception) -> Sketch | Exception:
    if isinstance(item, (Sketch, Exception)):
        return item
    return item.found() if isinstance(item, Later) else item.sketch()


def measure_later(
    tensors: Iterable[torch.Tensor], sample_above: int = 0, devices: Devices | None = None
) -> list[Sketch | Pending | Exception]:
    """Measure several tensors as they are now; small ones are copied, for a microsecond each, and measured on demand.

    Args:
        tensors: As for `measure`. They may be made one by one: large ones are not held.
        sample_above: As for `measure`.
        devices: Where those on a GPU wait until they are sent; without it, until they are asked for.

    Returns:
        For each tensor its sketch, or what will give it, or the exception that `measure` raises.

    Example:
        >>> import torch
        >>> ones = torch.ones(3)
        >>> (item,) = measure_later([ones])
        >>> ones.zero_(), item.sketch().mean
        (tensor([0., 0., 0.]), 1.0)
    """
    found: list[Sketch | Pending | Exception] = []
    groups: dict[torch.dtype, _Group] = {}
    devices = devices if devices is not None else Devices()
    waiting: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    with Unseen():
        for tensor in tensors:
            try:
                if _is_small(tensor):
                    group = groups.get(tensor.dtype)
                    if group is None or group.is_full:
                        if group is not None:
                            group.copy()
                        group = groups[tensor.dtype] = _Group()
                    found.append(group.add(tensor))
                elif _is_small_on_device(tensor):
                    together = waiting.setdefault((tensor.device, tensor.dtype), [])
                    together.append((len(found), tensor))
                    found.append(CapturingError())
                    if len(together) == _MOST_TOGETHER:
                        _launch(together, devices, found)
                else:
                    found.append(_measure_large(tensor, sample_above, devices))
            except Exception as error:
                found.append(error)
        for together in waiting.values():
            _launch(together, devices, found)
        for group in groups.values():
            group.copy()
    return found


def _is_small_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor on a GPU is measured by one launch together with others."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in _TYPES
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= SMALL
        and can_hide()
        and edge_for(tensor.device) is not None
    )


def _launch(
    together: list[tuple[int, torch.Tensor]], devices: Devices, found: list[Sketch | Pending | Exception]
) -> None:
    """Measure small tensors of one device and type, and put what will give their sketches into their places."""
    places, tensors = [place for place, _ in together], [tensor for _, tensor in together]
    together.clear()
    try:
        for place, sketch in zip(places, devices.add_small(tensors) if tensors else (), strict=True):
            found[place] = sketch
    except Exception as error:
        for place in places:
            found[place] = error


def _measure_large(tensor: torch.Tensor, sample_above: int, devices: Devices) -> Sketch | Pending:
    """Measure a tensor now, or where it lies; call it under `Unseen`."""
    if edge_for(tensor.device) is not None and can_hide():
        values = readable(tensor)
        found = devices.add(values.tensor.device, values)
        if found is not None:
            return found
    return measure(tensor, sample_above)


class Pending(Protocol):
    """A sketch that is not made yet."""

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait for a device."""

    def sketch(self) -> Sketch:
        """The sketch; whoever asks makes it, or waits for it."""


class Divided:
    """A sketch of values divided by a positive number, of which one or both are not known yet.

    Args:
        item: The sketch, or what will give it.
        scale: The number.

    Example:
        >>> Divided(measure(torch.tensor([512.0])), 1024.0).sketch().max
        0.5
    """

    __slots__ = ("_item", "_scale")

    def __init__(self, item: Sketch | Pending, scale: float | LateNumber) -> None:
        self._item = item
        self._scale = scale

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        is_known = isinstance(self._scale, float) or self._scale.is_there
        return is_known and (isinstance(self._item, Sketch) or self._item.is_there)

    def sketch(self) -> Sketch:
        """The sketch."""
        found = self._item if isinstance(self._item, Sketch) else self._item.sketch()
        return found.divided(float(self._scale))


class Together:
    """Several sketches of one site, merged when they are asked for.

    Args:
        parts: One at least.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Iterable[Sketch | Pending]) -> None:
        self._parts = list(parts)

    @property
    def is_there(self) -> bool:
        """Whether the sketch can be had without a wait."""
        return all(isinstance(part, Sketch) or part.is_there for part in self._parts)

    def sketch(self) -> Sketch:
        """The sketch of all."""
        merged = merge_all(part if isinstance(part, Sketch) else part.sketch() for part in self._parts)
        self._parts = [merged]
        return merged


class Later:
    """The sketch of a tensor that waits for others to be measured with."""

    __slots__ = ("_group", "_index")

    def __init__(self, group: _Group, index: int) -> None:
        self._group = group
        self._index = index

    @property
    def is_there(self) -> bool:
        """True: there is no device to wait for."""
        return True

    def found(self) -> Sketch | Exception:
        """The sketch, or what went wrong; what waits is measured now unless that is done."""
        return self._group.measured()[self._index]

    def sketch(self) -> Sketch:
        """The sketch; what waits is measured now unless that is done.

        Raises:
            Exception: What went wrong then.
        """
        found = self.found()
        if isinstance(found, Exception):
            raise found
        return found


class _Group:
    """Small tensors of one type that are measured at one time."""

    __slots__ = ("_flat", "_lengths", "_lock", "_measured", "_size", "_tensors", "is_full")

    def __init__(self) -> None:
        self.is_full = False
        """Whether no more is to be added."""
        self._tensors: list[torch.Tensor] = []
        self._lengths: list[int] = []
        self._size = 0
        self._flat: torch.Tensor | None = None
        self._measured: list[Sketch] | list[Exception] | None = None
        self._lock = threading.RLock()  # a finalizer may ask in the middle of our own calls

    def add(self, tensor: torch.Tensor) -> Later:
        """Take a tensor in."""
        size = tensor.numel()
        self._tensors.append(tensor)
        self._lengths.append(size)
        self._size += size
        self.is_full = self._size > BLOCK - SMALL or len(self._lengths) == GROUP
        return Later(self, len(self._lengths) - 1)

    def add_copy(self, tensor: torch.Tensor) -> Later | None:
        """Take a tensor in that nobody else has; None where the group is full or measured already."""
        with self._lock:
            return None if self.is_full else self.add(tensor)

    def copy(self) -> None:
        """Copy the values, so that the tensors are no longer needed; call it under `Unseen`."""
        self.is_full = True
        self._flat = flattened(self._tensors)
        self._tensors = []

    def measured(self) -> list[Sketch] | list[Exception]:
        """What was found for each tensor, in the order in which they came."""
        if self._measured is None:
            with self._lock, Unseen():
                if self._measured is None:
                    try:
                        if self._flat is None:
                            self.copy()
                        assert self._flat is not None
                        flat = self._flat
                        if flat.dtype is not torch.float32:
                            flat = torch.empty(flat.shape, dtype=torch.float32)
                            copy_flat(self._flat, flat)
                        self._measured = _sketches(flat.numpy(), np.array(self._lengths))
                    except Exception as error:
                        self._measured = [error] * len(self._lengths)
                    self._flat = None
        return self._measured


class Batch:
    """Takes tensors of any kind as they come; small ones are copied and measured together when one is asked for.

    Tensors may be added from several threads.

    Args:
        sample_above: As for `measure`.

    Example:
        >>> import torch
        >>> batch = Batch()
        >>> first, second = batch.add(torch.ones(3)), batch.add(torch.zeros(2))
        >>> first.sketch().mean, second.sketch().count
        (1.0, 2)
    """

    def __init__(self, sample_above: int = 0) -> None:
        self.devices = Devices()
        """Where what lies on GPUs waits until the batch is cut."""
        self._sample_above = sample_above
        self._groups: dict[torch.dtype, _Group] = {}

    def add(self, tensor: torch.Tensor) -> Sketch | Pending:
        """Measure a tensor as it is now, at once or later.

        Args:
            tensor: As for `measure`.

        Returns:
            The sketch, or what will give it.

        Raises:
            UnmeasurableError: As for `measure`.
        """
        with Unseen():
            if not _is_small(tensor):
                return _measure_large(tensor, self._sample_above, self.devices)
            copy = tensor.clone()
        group = self._groups.get(copy.dtype)
        later = group.add_copy(copy) if group is not None else None
        if later is None:
            group = self._groups[copy.dtype] = _Group()
            later = group.add(copy)
        return later

    def cut(self) -> None:
        """Measure what comes apart from what came, so that whoever measures that holds up nobody who adds.

        What lies on GPUs begins its way to the host.
        """
        self._groups = {}
        self.devices.send()


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether a tensor is measured together with others: small, plain and dense, on the CPU."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.dtype in _TYPES
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= SMALL
        and not tensor.is_nested
        and tensor.data_ptr() != 0  # its storage is freed
        and can_hide()
    )


class _Room(threading.local):
    """Room for one group, once a thread, and the numbers of the codes that occurred in the last ones."""

    def __init__(self) -> None:
        self.double = np.empty(BLOCK, np.float64)
        self.bits = np.empty(BLOCK, np.uint32)
        self.codes = np.empty(BLOCK, np.int64)
        self.keys = torch.empty(BLOCK, dtype=torch.int32)
        self.keys_array = self.keys.numpy()
        self.number(np.empty(0, np.int64))

    def number(self, present: IntArray) -> None:
        """Number the codes that occur; all others share the number that follows."""
        self.present = present
        self.numbers = np.full(CODES, present.size, np.int32)
        self.numbers[present] = np.arange(present.size)


_room = _Room()


def _sketches(flat: npt.NDArray[np.float32], lengths: IntArray) -> list[Sketch]:
    """Sketches of values that stand one tensor behind the other, 1 to `BLOCK` in all.

    Args:
        flat: The values, float32 of shape (n,).
        lengths: How many of them each tensor has, at least 1.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    with np.errstate(all="ignore"):  # sums of Inf are NaN, which is not used
        low, high = np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
        is_rare = ~(np.isfinite(low) & np.isfinite(high))
        double = _room.double[: flat.size]
        np.copyto(double, flat)
        totals = np.add.reduceat(double, starts)
        np.multiply(double, double, out=double)
        squares = np.add.reduceat(double, starts)
    occurring, counts, cuts = _count_codes(flat, lengths)
    zeros = np.add.reduceat(np.where(occurring & (SIGN - 1) == 0, counts, 0), cuts[:-1])
    # Code 0 takes what lies below 1.5e-39 too, zero or not.
    if zeros.any() and zeros.sum() != flat.size - np.count_nonzero(flat):
        is_rare |= zeros != np.add.reduceat(flat == 0, starts, dtype=np.int64)
    moments = zip(*(array.tolist() for array in (totals, squares, low, high, lengths, zeros)), strict=True)
    parts = itertools.pairwise(cuts.tolist())
    sketches = [
        _finite_sketch(occurring[start:end], counts[start:end], of_one)
        for (start, end), of_one in zip(parts, moments, strict=True)
    ]
    for index in is_rare.nonzero()[0].tolist():
        sketches[index] = Sketch.from_dense(*measure_exactly(flat[starts[index] : ends[index]]))
    return sketches


def _finite_sketch(
    codes: npt.NDArray[np.uint16], counts: IntArray, moments: tuple[float, float, float, float, int, int]
) -> Sketch:
    """A sketch without NaN and Inf; a frozen dataclass itself sets its fields by one slow call each."""
    total, total_squares, low, high, count, zero_count = moments
    sketch = object.__new__(Sketch)
    sketch.__dict__.update(
        codes=codes,
        counts=counts,
        total=total,
        total_squares=total_squares,
        low=low,
        high=high,
        count=count,
        zero_count=zero_count,
        nan_count=0,
        inf_count=0,
        histogram_share=1.0,
    )
    return sketch


def _count_codes(
    flat: npt.NDArray[np.float32], lengths: IntArray
) -> tuple[npt.NDArray[np.uint16], IntArray, npt.NDArray[np.intp]]:
    """Codes that occur and their counts, one tensor behind the other, and the places where tensors begin and end."""
    bits, codes = _room.bits[: flat.size], _room.codes[: flat.size]
    np.right_shift(flat.view(np.uint32), _CODE_SHIFT, out=bits)
    np.copyto(codes, bits)
    firsts, dense = _count_numbers(codes, lengths)
    others = dense[_room.present.size :: _room.present.size + 1]
    if others.any():
        occurring = np.bincount(codes, minlength=CODES).astype(np.bool_)
        if _room.present.size <= _MOST_NUMBERS:
            occurring[_room.present] = True
        _room.number(occurring.nonzero()[0])
        firsts, dense = _count_numbers(codes, lengths)
    found = dense.astype(np.bool_).nonzero()[0]
    cuts = np.searchsorted(found, firsts)
    numbers = found - np.repeat(firsts[:-1], np.diff(cuts))
    return _room.present[numbers].astype(np.uint16), dense[found], cuts


def _count_numbers(codes: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Where the counts of each tensor begin, and how often each number occurs in it."""
    keys = _room.keys_array[: codes.size]
    np.take(_room.numbers, codes, out=keys, mode="clip")  # other modes copy what they are given
    firsts = np.arange(lengths.size + 1) * (_room.present.size + 1)
    np.add(keys, np.repeat(firsts[:-1].astype(np.int32), lengths), out=keys)
    return firsts, count_numbers(_room.keys[: codes.size], int(firsts[-1]))
