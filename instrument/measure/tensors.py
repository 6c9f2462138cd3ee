"""What kinds of tensor there are, and how their values are reached without changing or copying them.

| tensor | measured by |
| --- | --- |
| dense, any strides | its memory, in whatever order is cheapest: a sketch knows no order |
| expanded (stride 0) | the elements that exist, each counted as often as it is repeated |
| complex | magnitude |
| sparse (COO, CSR, CSC, BSR, BSC) | its values, plus the zeros that are implied |
| DTensor | the shard on this rank |
| subclass in Python without a dispatcher of its own | as the plain tensor it is |
| meta, fake, lazy, quantized, nested, masked, packed or other wrapper, freed storage | `UnmeasurableError` |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from instrument.errors import UnmeasurableError
from instrument.torch_private import is_fake

__all__ = ["PLAIN", "Values", "chunks", "readable", "whole"]

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
"""Types whose values lie where the tensor says; a subclass may hold others."""

_SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_PACKED = tuple(
    getattr(torch, name)
    for name in ("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16")
    if hasattr(torch, name)
)
"""Types that hold several values an element, or bits without a meaning; no conversion exists."""


class Values(NamedTuple):
    """The values of a tensor, as something that can be read block by block."""

    tensor: torch.Tensor
    """Dense and plain, on any device; no dimension is expanded."""

    repeat: int
    """How often each element counts."""

    implied_zeros: int
    """How many zeros there are besides."""


def readable(tensor: torch.Tensor) -> Values:
    """Find the values of any tensor; call it under `Unseen`.

    Args:
        tensor: A tensor of any kind, type, shape and device.

    Returns:
        The values; they share the tensor's memory wherever they can.

    Raises:
        UnmeasurableError: The tensor has no values that can be read; the message says why.
    """
    tensor = _plain(tensor)
    implied_zeros = 0
    if tensor.layout is not torch.strided:
        dense_size = tensor.numel()
        tensor = _stored_values(tensor)
        implied_zeros = dense_size - tensor.numel()
    tensor = _with_values(tensor)
    if tensor.is_contiguous():
        return Values(tensor, 1, implied_zeros)
    repeat = 1
    for dimension, stride in enumerate(tensor.stride()):
        size = tensor.shape[dimension]
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
            repeat *= size
    return Values(tensor, repeat, implied_zeros)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor of real floating-point values as a plain one of the same shape; call it under `Unseen`.

    Args:
        tensor: A tensor of any kind.

    Returns:
        The tensor detached; it shares the memory.

    Raises:
        UnmeasurableError: It has no such values, is sparse, or is one shard of a `DTensor`, of which nobody here knows
            which part of the shape it is.
    """
    if type(tensor) not in PLAIN and hasattr(tensor, "to_local"):
        raise UnmeasurableError("it is a shard of a larger tensor")
    tensor = _plain(tensor)
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise UnmeasurableError(f"it has no dense floating-point values ({tensor.dtype}, {tensor.layout})")
    return _with_values(tensor)


def _with_values(tensor: torch.Tensor) -> torch.Tensor:
    """The strided tensor itself, with its negative bit resolved, or the reason why its memory holds no values."""
    if tensor.dtype in _PACKED:
        raise UnmeasurableError(f"type {tensor.dtype} packs several values into an element")
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise UnmeasurableError("its storage is freed at the moment")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor detached and without its subclass, or the reason why it has no values."""
    if type(tensor) not in PLAIN:
        if is_lazy(tensor):
            raise UnmeasurableError("it is lazy and has no values yet")
        if is_fake(tensor):
            raise UnmeasurableError("it is a fake tensor, which has no values")
        if hasattr(tensor, "to_local"):
            if any(placement.is_partial() for placement in getattr(tensor, "placements", ())):
                raise UnmeasurableError("it is one of the sums that the ranks have yet to add up")
            return _plain(tensor.to_local())
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise UnmeasurableError(f"its type {type(tensor).__name__} wraps other tensors in a way of its own")
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_meta:
        raise UnmeasurableError("it is on the meta device and has no values")
    if tensor.is_nested:
        raise UnmeasurableError("it is a nested tensor")
    if tensor.is_quantized:
        raise UnmeasurableError(f"it is quantized ({tensor.dtype})")
    return tensor.detach()


def _stored_values(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    if tensor.layout in _SPARSE:
        return tensor.values()
    raise UnmeasurableError(f"its layout is {tensor.layout}")


def chunks(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Cut a dense tensor into pieces of at most `size` elements without copying it, in any order.

    Args:
        tensor: Strided, of any shape; what is contiguous in memory in some order of its dimensions comes as
            one-dimensional pieces.
        size: The most elements in a piece.

    Yields:
        Views that together hold each element once.
    """
    if tensor.numel() == 0:
        return
    tensor = in_memory_order(tensor)
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from flat.split(size) if flat.numel() > size else (flat,)
        return
    yield from _slices(tensor, size)


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements with dimensions ordered from the widest stride to the narrowest; a view."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order)


def _slices(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    if tensor.numel() <= size:
        yield tensor
        return
    inner = tensor.numel() // tensor.shape[0]
    if inner >= size:
        for piece in tensor.unbind(0):
            yield from _slices(piece, size)
    else:
        yield from tensor.split(size // inner)
