"""Codes and moments of a tensor, added up where it lies: by a Triton kernel, or by operations of torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from instrument.errors import UnmeasurableError, warn_quietly
from instrument.measure.device.rows import NEW_MOMENTS
from instrument.measure.histogram import CODES, SIGN
from instrument.measure.tensors import Values, chunks

__all__ = ["FLOATS", "GIVEN_UP", "accumulate", "give_up", "kernel_for", "launching", "on", "unit_kernel_for"]

_PIECE = 1 << 22
"""Elements that are worked on at once without Triton, where float64 copies of them are made."""

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Types that the kernels read."""

_LAUNCH = 1 << 30
"""Elements that one launch of a kernel measures: what it has not measured goes another way where it fails."""

GIVEN_UP = "a kernel could not be launched; others will not be asked for"
"""Why units are not tallied."""

_NO_FAULT = (
    "out of memory", "CUDA error:", "device-side assert", "illegal memory access", "unspecified launch failure"
)  # fmt: skip
"""Words of errors that are no fault of Triton's."""

_given_up: list[Any] = []
"""Modules with kernels that could not be launched."""

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
    if values[1:] == (1, 0) and tensor.dtype in FLOATS and tensor.is_contiguous():
        with on(tensor.device):
            _add(tensor, codes, moments, kernel)
        return
    own_codes, own_moments = codes, moments
    if values.repeat != 1:
        own_codes = torch.zeros_like(codes)
        own_moments = torch.empty_like(moments)
        for place, value in enumerate(NEW_MOMENTS):
            own_moments[place].fill_(value)
    with on(tensor.device):
        for piece in chunks(tensor, _PIECE if kernel is None else max(tensor.numel(), 1)):
            _add(_as_floats(piece), own_codes, own_moments, kernel)
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


def _add(values: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor, kernel: Any) -> None:
    """Add contiguous values of a type in `FLOATS`, by a kernel where there is one that can be launched."""
    for piece in (values,) if values.numel() <= _LAUNCH else chunks(values, _LAUNCH):
        if kernel is not None:
            try:
                kernel.accumulate_values(piece, codes, moments)
            except Exception as error:
                give_up(kernel, error)
                kernel = None
            else:
                continue
        for part in chunks(piece, _PIECE):
            _accumulate_plainly(part, codes, moments)


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
    kernel = _imported_kernel() if device.type == "cuda" or is_interpreted else None
    return None if kernel in _given_up else kernel


def unit_kernel_for(device: torch.device) -> Any:
    """The same of those that tally units."""
    kernel = _imported_unit_kernel() if kernel_for(device) is not None else None
    return None if kernel in _given_up else kernel


def give_up(kernel: Any, error: Exception) -> None:
    """Use a module with kernels no more, as if Triton were missing, and say so: it wants a compiler of C, for one.

    Args:
        kernel: The module.
        error: What it raised.

    Raises:
        Exception: The error, where that is no fault of Triton's: the device has no memory left, or what was launched
            before has failed.
    """
    if any(words in str(error) for words in _NO_FAULT):
        raise error
    if kernel not in _given_up:
        _given_up.append(kernel)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn_quietly(
            f"Triton cannot be used here ({reason}), so tensors on the GPU are measured by operations of torch, with "
            "the same results in more time"
        )


@contextlib.contextmanager
def launching(kernel: Any) -> Iterator[None]:
    """Around the launch of a kernel; where that fails, it is given up.

    Raises:
        UnmeasurableError: It could not be launched; whoever asks again finds no such kernel.
    """
    try:
        yield
    except Exception as error:
        give_up(kernel, error)
        raise UnmeasurableError(GIVEN_UP) from error


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
