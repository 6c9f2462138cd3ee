"""Large arrays that come again each step, given out anew once nobody refers to them.

What a writer makes of a step of 1600 small tensors are arrays of megabytes that live for milliseconds. The C library
gives each back to the system when it is freed, and takes pages anew for the next, which the kernel clears one by one:
900 pages a step, 2.5 of 13 ms, in a process where no larger block was ever freed. Who asks here gets the memory of an
array that is used no more.

Whether it is, CPython counts: a view of an array, and a view of a view, refers to the array that owns the memory. So an
owner that nothing but its keeper refers to is free, whoever had it and whatever they did with it. References are
counted by a call from C: how many a variable of Python is good for depends on the version, on tracers, and on whether
Dynamo runs somewhere.
"""

from __future__ import annotations

import collections
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["KEPT_BYTES", "LEAST_BYTES", "MOST_BYTES", "copied", "empty", "joined", "joined_tensors"]

LEAST_BYTES = 64 << 10
"""Smaller arrays are left to the C library, which keeps what it is given back of them."""

MOST_BYTES = 8 << 20
"""So are larger ones: to fill them takes long enough."""

KEPT_BYTES = 32 << 20
"""Memory that a thread keeps at most, until it ends; what it has is let go where it would be more."""

_Owner = npt.NDArray[np.uint8]


class _Kept(threading.local):
    """Owners of memory of one thread by their size, and how large they are in all."""

    def __init__(self) -> None:
        self.owners: dict[int, collections.deque[_Owner]] = collections.defaultdict(collections.deque)
        self.size = 0


_kept = _Kept()


def empty(size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of any values, as `numpy.empty` gives one.

    Args:
        size: How many.
        dtype: Their type, of numbers.

    Returns:
        An array of shape (size,), whose memory nobody is given again before it and all views of it are gone.

    Example:
        >>> empty(3, np.float64).shape
        (3,)
    """
    dtype = np.dtype(dtype)
    wanted = size * dtype.itemsize
    if not LEAST_BYTES <= wanted <= MOST_BYTES:
        return np.empty(size, dtype)
    # Powers of two, since the next step needs a little more or less.
    return _owner(1 << (wanted - 1).bit_length())[:wanted].view(dtype)


def joined_tensors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors on the CPU of shape (n,) and of one type, at least one, one behind the other; call it under `Unseen`.

    By NumPy: `torch.cat` would wake torch's threads, for which a forked child waits for ever.
    """
    values = joined([tensor.view(torch.uint8).numpy() for tensor in tensors])
    return torch.from_numpy(values).view(tensors[0].dtype)


def copied(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy of an array of shape (n,)."""
    copy = empty(array.size, array.dtype)
    copy[:] = array
    return copy


def joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays of shape (n,) and of one type, at least one, one behind the other."""
    return np.concatenate(arrays, out=empty(sum(array.size for array in arrays), arrays[0].dtype), casting="no")


def _owner(size: int) -> _Owner:
    """Memory of this size that nobody has."""
    owners = _kept.owners[size]
    for _ in range(len(owners)):
        try:
            # Out of reach while it is looked at: a finalizer in the middle of this may ask for memory, too.
            box = [owners.popleft()]
        except IndexError:
            break
        is_free = _references_in(box) == _FREE
        owner = box.pop()
        owners.append(owner)
        if is_free:
            return owner
    if _kept.size + size > KEPT_BYTES:
        _kept.owners.clear()
        _kept.size = 0
    owner = np.empty(size, np.uint8)
    _kept.owners[size].append(owner)
    _kept.size += size
    return owner


def _references_in(box: list[_Owner]) -> int:
    """References to the only owner in a list, that of the list and of this question among them."""
    return next(map(sys.getrefcount, box))


_FREE = _references_in([np.empty(1, np.uint8)])
"""Those to an owner that is in a list and nowhere else."""
