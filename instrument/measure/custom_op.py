"""Measuring any tensor, and the custom operator behind which every backend stands.

``instrument::measure(Tensor x, Tensor(a!) codes, Tensor(b!) moments) -> ()`` adds the values of `x` to int64
counts of 4096 codes and to five float64 moments. As an operator with a fake implementation it may stand in a
compiled graph (called under a Python bool in a hook: no graph break, exactly two graphs). Outside of graphs
`measure` calls the same functions directly, since the call of a custom operator costs more than a small tensor.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from instrument.errors import InstrumentError, UnmeasurableError
from instrument.measure import native
from instrument.measure.cpu import BLOCK, accumulate_cpu, measure_cpu
from instrument.measure.device import Devices, accumulate, edge_for
from instrument.measure.sketch import CODES, Sketch, empty_moments
from instrument.measure.tensors import Values, chunks, readable
from instrument.torch_private import Unseen, can_hide

__all__ = ["measure"]

torch.library.define("instrument::measure", "(Tensor x, Tensor(a!) codes, Tensor(b!) moments) -> ()")

_TRANSFER = 1 << 22
"""Elements copied to the host at once from a device that has no kernel of its own."""


@torch.library.impl("instrument::measure", "CPU")
def _measure_on_cpu(x: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Add to the accumulators; what cannot be measured makes the count NaN, since this runs inside of a graph."""
    try:
        with Unseen():
            accumulate_cpu(readable(x), codes.numpy(), moments.numpy())
    except Exception:
        moments[0] = math.nan


@torch.library.impl("instrument::measure", "CUDA")
def _measure_on_cuda(x: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """The same where the accumulators lie, which no thread waits for."""
    try:
        with Unseen():
            accumulate(readable(x.to(codes.device, non_blocking=True)), codes, moments)
    except Exception:
        moments[:1].fill_(math.nan)


@torch.library.register_fake("instrument::measure")  # type: ignore[untyped-decorator]  # torch leaves it without
def _measure_fake(x: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor) -> None:
    """Nothing is returned, so there is no shape to work out."""


def measure(tensor: torch.Tensor, sample_above: int = 0) -> Sketch:
    """Measure the values of a tensor into a sketch, without changing it or any state of torch.

    Args:
        tensor: Of any shape, strides and type: floating point (float8 included), integers, bool; complex by
            its magnitude; sparse by its values plus the zeros implied; DTensor by its local shard.
        sample_above: The histogram of a tensor with more elements is made of about this many of them, which takes
            four fifths of the time for millions of elements; 0 means that it is always made of all. Statistics and
            counts of zeros, NaN and Inf are of all values in any case. Where it would save nothing, it is of all: on a
            GPU, and beyond 524,288 elements of 16-bit floating point.

    Returns:
        The sketch; its `histogram_share` says where it was sampled.

    Raises:
        UnmeasurableError: The tensor has no values that can be read (meta, fake, lazy, quantized, nested), or not
            without a dispatch mode of the user's seeing it.
        InstrumentError: Something else than a tensor was given.

    Example:
        >>> import torch, instrument
        >>> instrument.measure(torch.tensor([1.0, 2.0, 3.0]))
        Sketch(count=3, mean=2, std=0.8165, min=1, max=3, zero_fraction=0)
    """
    if not isinstance(tensor, torch.Tensor):
        raise InstrumentError(f"measure() was given {type(tensor).__name__}, allowed is a torch.Tensor")
    if not can_hide():
        raise UnmeasurableError("a dispatch mode is active, and this version of torch offers no way to step out of it")
    with Unseen():
        if native.can_read(tensor) and tensor.numel() <= min(BLOCK, sample_above or BLOCK):  # the cheapest way
            return native.sketch_of(tensor)
        values = readable(tensor)
        if values.tensor.is_cpu:
            return measure_cpu(values, sample_above)
        if edge_for(values.tensor.device) is not None:
            return Devices().add(values).sketch()
        return _measure_by_transfer(values)


def _measure_by_transfer(values: Values) -> Sketch:
    """Measure on the host what lies on a device that has no kernel of its own; waits for the device."""
    codes, moments = np.zeros(CODES, np.int64), empty_moments()
    for piece in chunks(values.tensor, _TRANSFER):
        accumulate_cpu(Values(piece.cpu(), values.repeat, 0), codes, moments)
    accumulate_cpu(Values(torch.empty(0), 1, values.implied_zeros), codes, moments)
    return Sketch.from_dense(codes, moments.tolist())
