"""Which tensors are small, so that they are measured together, and how many of them at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch

from instrument.measure import native
from instrument.measure.tensors import PLAIN

__all__ = ["GROUP", "SIZES", "SMALL", "TOGETHER", "cut", "small", "small_together"]

SMALL = 8192
"""Tensors of up to this many elements are measured together; a larger one is cheaper by itself."""

GROUP = 1024
"""Tensors in a group, at most: each has counts of its own."""

TOGETHER = 524_288
"""Elements in a group, at most: some 100 us of Python for each group hold a backward pass up, which needs the same
interpreter lock. With groups of a quarter of this, a step of 400 layers of width 32 had 22 and waited 16 ms, now 10."""

SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
"""Types whose values are exactly those of a float32, and their bytes."""

_OTHERS = 0, 0


def small(tensor: torch.Tensor) -> tuple[int, int]:
    """Whether a tensor is measured together with others: small and plain, on the CPU, with memory of its own.

    Args:
        tensor: Any.

    Returns:
        The number of its elements, 0 where it is not; and where they lie, 0 where they do not lie in a row.
    """
    if type(tensor) not in PLAIN:
        return _OTHERS
    itemsize = SIZES.get(tensor.dtype)
    if itemsize is None or not tensor.is_cpu or tensor.layout is not torch.strided:
        return _OTHERS
    size = tensor.numel()
    if not 0 < size <= SMALL or tensor.is_nested:
        return _OTHERS
    if not tensor.is_contiguous() or tensor.is_neg():
        return (size, 0) if tensor.untyped_storage().nbytes() else _OTHERS
    address = native.address_of(tensor, size * itemsize)
    return (size, address) if address else _OTHERS


_ALIKE = operator.attrgetter("dtype", "layout", "is_cpu", "is_nested")


def small_together(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]] | None:
    """The same of many tensors by a few calls for all of them, where they are alike; call it under `Unseen`.

    Args:
        tensors: Any.

    Returns:
        What `small` gives for each, sizes and addresses; None where each is to be asked by itself.
    """
    if not tensors or not PLAIN.issuperset(map(type, tensors)):
        return None
    alike = set(map(_ALIKE, tensors))
    dtype, layout, is_cpu, is_nested = alike.pop()
    if alike or dtype not in SIZES or layout is not torch.strided or not is_cpu or is_nested:
        return None
    if not all(map(_is_contiguous, tensors)) or any(map(_is_neg, tensors)) or any(map(_storage_offset, tensors)):
        return None
    sizes, addresses = list(map(_numel, tensors)), list(map(_data_ptr, tensors))
    if 0 in addresses or max(sizes) > SMALL:
        sizes = [size if size <= SMALL and address else 0 for size, address in zip(sizes, addresses, strict=True)]
    return sizes, addresses


_is_contiguous, _is_neg, _storage_offset, _numel, _data_ptr = (
    torch.Tensor.is_contiguous, torch.Tensor.is_neg, torch.Tensor.storage_offset, torch.Tensor.numel,
    torch.Tensor.data_ptr,
)  # fmt: skip


def cut(sizes: Sequence[int], most: int = TOGETHER) -> Iterator[tuple[slice, int]]:
    """Which of many small tensors make a group, of `most` elements at most, and the elements of that."""
    start = size = 0
    for end, more in enumerate(sizes, 1):
        size += more
        if end == len(sizes) or size > most - SMALL or end - start == GROUP:
            yield slice(start, end), size
            start, size = end, 0
