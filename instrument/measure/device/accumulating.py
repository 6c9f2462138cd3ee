"""Codes and moments of a tensor, added up where it lies: by a Triton kernel, or by operations of torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch

from instrument.measure.device.rows import NEW_MOMENTS
from instrument.measure.histogram import CODES, SIGN
from instrument.measure.tensors import Values, chunks

__all__ = ["FLOATS", "accumulate", "kernel_for", "on", "unit_kernel_for"]

_PIECE = 1 << 22
"""Elements that are worked on at once without Triton, where float64 copies of them are made."""

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Types that the kernels read."""

_LARGEST = torch.finfo(torch.float32).max
_NAN_CODE = 0x7FC


def accumulate(values: Values, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Add the values of a tensor to accumulators on its device; nothing waits. Call it under `Unseen`.

    Args:
        values: The values, on any device.
        codes: Int64 of shape (4096,), added to in place.
        moments: Float64 of shape (5,), combined in place: count, sum, sum of squares, minimum, maximum.
    """
    tensor = values.tensor
    kernel = kernel_for(tensor.device)
    if kernel is not None and values[1:] == (1, 0) and tensor.dtype in FLOATS and tensor.is_contiguous():
        with on(tensor.device):
            kernel.accumulate_values(tensor, codes, moments)
        return
    add = _accumulate_plainly if kernel is None else kernel.accumulate_values
    own_codes, own_moments = codes, moments
    if values.repeat != 1:
        own_codes = torch.zeros_like(codes)
        own_moments = torch.empty_like(moments)
        for place, value in enumerate(NEW_MOMENTS):
            own_moments[place].fill_(value)
    with on(tensor.device):
        for piece in chunks(tensor, _PIECE if kernel is None else max(tensor.numel(), 1)):
            add(_as_floats(piece), own_codes, own_moments)
    if values.repeat != 1:
        codes += values.repeat * own_codes
        moments[:3] += values.repeat * own_moments[:3]
        torch.minimum(moments[3], own_moments[3], out=moments[3])
        torch.maximum(moments[4], own_moments[4], out=moments[4])
    if values.implied_zeros:
        codes[0] += values.implied_zeros
        moments[0] += values.implied_zeros
        moments[3].clamp_(max=0.0)
        moments[4].clamp_(min=0.0)


def _as_floats(piece: torch.Tensor) -> torch.Tensor:
    """The piece flat, in a type that the kernels read."""
    if piece.is_complex():
        piece = piece.to(torch.complex128 if piece.dtype is torch.complex128 else torch.complex64).abs()
    if piece.dtype not in FLOATS:
        is_wide = piece.dtype in (torch.int32, torch.int64, torch.uint32, torch.uint64)
        piece = piece.to(torch.float64 if is_wide else torch.float32)
    return piece.reshape(-1).contiguous()  # of a strided tensor `reshape` may make a view


def _accumulate_plainly(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """The same in operations of torch that do not wait for a device."""
    exact = values.double()
    is_finite = exact.isfinite()
    single = torch.where(is_finite, exact.clamp(-_LARGEST, _LARGEST), exact).float()
    code = (single.view(torch.int32) >> 20) & (CODES - 1)
    code = torch.where((code & (SIGN - 1) == 0) & (exact != 0), code + 1, code)
    code = torch.where(exact.isnan(), _NAN_CODE, code).long()
    codes.scatter_add_(0, code, torch.ones_like(code))
    finite = torch.where(is_finite, exact, 0.0)
    moments[:3] += torch.stack((is_finite.sum().double(), finite.sum(), finite.square().sum()))
    torch.minimum(moments[3], torch.where(is_finite, exact, float("inf")).amin(), out=moments[3])
    torch.maximum(moments[4], torch.where(is_finite, exact, float("-inf")).amax(), out=moments[4])


def kernel_for(device: torch.device) -> Any:
    """The module with the Triton kernels, or None where Triton does not serve a device."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels on the CPU, for tests
    return _imported_kernel() if device.type == "cuda" or is_interpreted else None


def unit_kernel_for(device: torch.device) -> Any:
    """The same of those that tally units."""
    return _imported_unit_kernel() if kernel_for(device) is not None else None


@functools.cache
def _imported_kernel() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from instrument.measure.device import kernel

    return kernel


@functools.cache
def _imported_unit_kernel() -> Any:
    from instrument.measure.device import unit_kernel

    return unit_kernel


def on(device: torch.device) -> Any:
    """Context in which kernels are launched on a device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
