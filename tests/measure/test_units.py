"""Tallies of units, held against a brute-force twin in float64, and the laws of their merging."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.errors import UnmeasurableError
from instrument.measure.slopes import Slopes, slopes_named
from instrument.measure.units import (
    DeviceTally,
    UnitTally,
    extent_of,
    merge_tallies,
    tally_on_device,
    tally_plain,
    tally_rows,
    tally_units,
)
from instrument.torch_private import Unseen

pytestmark = pytest.mark.usefixtures("engine")

FUNCTIONS = ["relu", "relu6", "tanh", "gelu", "sigmoid", "logsigmoid", "leaky_relu", None]

SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((7, 5), 1),
    ((64, 3), 1),
    ((1, 300), 1),
    ((3000, 16), 1),
    ((4, 10, 6), 2),
    ((6, 5, 4, 3), 1),
    ((40, 3, 12, 11), 1),
    ((5, 70, 40, 50), 1),
    ((3, 4, 9), 1),
    ((2, 3, 4, 5, 6), 1),
    ((9,), 0),
]


def tally(tensor: torch.Tensor, axis: int, function: str | None) -> UnitTally:
    with Unseen():
        found = tally_units(tensor, axis, slopes_named(function) if function else None)
    return found if isinstance(found, UnitTally) else found.fetch()


def sample(shape: tuple[int, ...], axis: int, seed: int = 0) -> torch.Tensor:
    """Values whose units lie in either tail, in both, between them, or all over."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator)
    for unit in range(shape[axis]):
        values = z.select(axis, unit)
        if unit % 6 == 1:
            values.sub_(12)
        elif unit % 6 == 2:
            values.add_(12)
        elif unit % 6 == 3:
            values.add_(torch.sign(values) * 12)
        elif unit % 6 == 4:
            values.fill_(0.7)
    return z


def twin(tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> dict[str, Any]:
    """The same by brute force: each sample, each unit, each position."""
    values = np.moveaxis(tensor.to(torch.float64).numpy(), axis, 0)
    values = values.reshape(values.shape[0], math.prod(tensor.shape[:axis]), -1)
    found: dict[str, Any] = {"low": values.min(axis=(1, 2)), "high": values.max(axis=(1, 2))}
    if slopes is not None:
        for name, tails in (("flat", slopes.flat), ("dead", slopes.dead)):
            is_flat = (values <= np.float64(np.float32(tails.low))) | (values >= np.float64(np.float32(tails.high)))
            found[name] = is_flat.all(axis=2)
            found[f"any {name}"] = is_flat.any(axis=(1, 2))
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_brute_force(shape: tuple[int, ...], axis: int, dtype: torch.dtype, function: str | None) -> None:
    """Ranges, dead and never-flat units are those of a search through every value; counts are of real samples."""
    z = sample(shape, axis).to(dtype)
    found, slopes = tally(z, axis, function), slopes_named(function) if function else None
    truth = twin(z, axis, slopes)
    samples = math.prod(shape[:axis])
    assert (found.function, found.samples, found.batches, found.units) == (function, samples, 1, shape[axis])
    assert np.array_equal(found.low, truth["low"])
    assert np.array_equal(found.high, truth["high"])
    if slopes is None:
        assert found.counted == 0
        assert not found.dead_flat.any()
        return
    assert np.array_equal(found.dead_flat, truth["dead"].all(axis=1))
    expected = ~truth["any flat"] if slopes.is_piecewise_linear else np.zeros(shape[axis], bool)
    assert np.array_equal(found.never_flat, expected)
    assert 0 < found.counted <= min(samples, 64)
    if found.counted == samples:
        assert np.array_equal(found.flat, truth["flat"].sum(axis=1))
    else:
        assert np.all(found.flat <= truth["flat"].sum(axis=1))
        assert np.all(found.counted - found.flat <= (~truth["flat"]).sum(axis=1))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    """How a tensor lies in memory changes nothing of what is found."""
    z = sample((12, 7, 20, 15), 1)
    if layout == "channels_last":
        odd = z.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        odd = z.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    elif layout == "strided":
        odd = torch.zeros(24, 7, 20, 30)[::2, :, :, ::2].copy_(z)
    else:
        z = odd = z[:, :, :1].expand(12, 7, 20, 15)
    assert layout == "expanded" or not odd.is_contiguous()
    for function in ("relu", "tanh", None):
        same(tally(odd, 1, function), tally(z.contiguous(), 1, function))


def same(a: UnitTally, b: UnitTally) -> None:
    """Both are equal; the mean square within rounding and the sample it is of."""
    for name in ("function", "samples", "batches", "counted", "witness"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("low", "high", "flat", "dead_flat", "never_flat"):
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True), name
    assert a.square_mean == pytest.approx(b.square_mean, rel=0.5, nan_ok=True)


def test_images_are_counted_not_positions() -> None:
    """A channel that fires at one position of one image in four is flat on three samples of four."""
    z = torch.full((4, 2, 8, 8), -1.0)
    z[1, 0, 3, 4] = 1.0
    found = tally(z, 1, "relu")
    assert (found.samples, found.counted, found.flat.tolist()) == (4, 4, [3, 4])
    assert found.dead_flat.tolist() == [False, True]


def test_both_tails_are_looked_through() -> None:
    """A unit that jumps from tail to tail is dead; one single value between them, uncounted, keeps it alive."""
    z = torch.where(torch.arange(1000).view(-1, 1) % 2 == 0, 9.0, -9.0).repeat(1, 2)
    step = next(step for step in range(16, 100) if math.gcd(step, 1000) == 1)
    z[step + 1, 1] = 0.1
    found = tally(z, 1, "tanh")
    assert found.counted < 1000
    assert found.flat.tolist() == [found.counted] * 2
    assert found.dead_flat.tolist() == [True, False]


def test_nan_is_no_death() -> None:
    """A unit with a NaN is neither dead, nor flat there, nor never flat, and its range is unknown."""
    z = torch.full((4, 3), -1.0)
    z[2, 1] = math.nan
    z[:, 2] = 5.0
    z[0, 2] = math.nan
    found = tally(z, 1, "relu")
    assert found.dead_flat.tolist() == [True, False, False]
    assert found.never_flat.tolist() == [False, False, False]
    assert found.flat.tolist() == [4, 3, 0]
    assert np.isnan(found.low).tolist() == [False, True, True]


def test_the_counted_samples_meet_every_position() -> None:
    """With sequences of 64 tokens, of which the first alone fires, the share of flat samples is right."""
    z = torch.full((512, 64, 1), -1.0)
    z[:, 0] = 1.0
    found = tally(z, 2, "relu")
    assert 0 < found.counted < 512 * 64
    assert abs(float(found.flat[0]) / found.counted - 63 / 64) <= 1 / 64


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 5, 3, 3)])
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    """No sample and no unit give an empty tally, which is neutral under merge."""
    found = tally(torch.empty(shape), 1, "relu")
    assert (found.samples, found.batches, found.units) == (0, 0, shape[1])
    if shape[1]:
        other = tally(sample((6, shape[1]), 1), 1, "relu")
        same(found.merge(other), other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 2, dtype=torch.int64),
        torch.ones(3, 2, dtype=torch.complex64),
        torch.ones(3, 2).to_sparse(),
        torch.ones(3, 2, device="meta"),
    ],
    ids=["integers", "complex", "sparse", "meta"],
)
def test_unmeasurable(tensor: torch.Tensor) -> None:
    """What has no dense real values is refused with the one error for that."""
    with Unseen(), pytest.raises(UnmeasurableError):
        tally_units(tensor, 1, None)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_way_for_devices(shape: tuple[int, ...], axis: int, function: str | None) -> None:
    """What other devices compute, by torch alone, is what the CPU finds; they count every sample."""
    z, slopes = sample(shape, axis), slopes_named(function) if function else None
    with Unseen():
        deferred = tally_on_device(z, axis, slopes)
    assert isinstance(deferred, DeviceTally)
    found, expected = deferred.fetch(), tally(z, axis, function)
    for name in ("function", "samples", "batches"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("low", "high", "dead_flat", "never_flat"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    if slopes is not None:
        assert found.counted == found.samples
        assert np.array_equal(found.flat, twin(z, axis, slopes)["flat"].sum(axis=1))


def test_known_ranges_are_used() -> None:
    """Ranges that were found before for the same tensor give the same tally."""
    z = sample((50, 12), 1)
    with Unseen():
        found = tally_plain(z, 1, slopes_named("tanh"), extent_of(z, 1))
    assert isinstance(found, UnitTally)
    same(found, tally(z, 1, "tanh"))


def test_rows_of_gradients() -> None:
    """Rows that are zero in every element are flat; a single element anywhere keeps a row alive."""
    gradient = torch.zeros(5, 300)
    gradient[1, 0] = 1e-30
    gradient[3, 299] = -1.0
    gradient[4, 131] = math.nan
    with Unseen():
        found = tally_rows(gradient, 0, 64)
    assert isinstance(found, UnitTally)
    assert found.dead_flat.tolist() == [True, False, True, False, False]
    assert (found.flat.tolist(), found.counted, found.samples, found.batches) == ([1, 0, 1, 0, 0], 1, 64, 1)
    assert found.witness == "gradient rows"


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 3, 3), 0), ((3, 6, 3, 3), 1), ((6, 1), 0)])
def test_rows_of_kernels(shape: tuple[int, ...], axis: int) -> None:
    """The unit of a convolution's kernel is its output channel, the second dimension of a transposed one."""
    gradient = torch.ones(shape)
    gradient.select(axis, 4).zero_()
    with Unseen():
        found = tally_rows(gradient, axis, 1)
    assert isinstance(found, UnitTally)
    assert np.flatnonzero(found.dead_flat).tolist() == [4]


def test_a_gradient_of_nothing_says_nothing() -> None:
    """A gradient that is zero in whole is no evidence: a frozen layer is not dead."""
    with Unseen():
        found = tally_rows(torch.zeros(4, 3), 0, 64)
    assert isinstance(found, UnitTally)
    assert (found.samples, found.batches, found.units) == (0, 0, 4)


PIECES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 10.0])), min_size=2, max_size=5
)


def pieces_of(drawn: list[tuple[int, int, float]]) -> list[torch.Tensor]:
    return [torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)) * scale for rows, seed, scale in drawn]


@settings(max_examples=60, deadline=None)
@given(PIECES, st.sampled_from(FUNCTIONS))
def test_merging_is_tallying_at_once(drawn: list[tuple[int, int, float]], function: str | None) -> None:
    """Tallies of pieces merge to the tally of the whole, in any grouping; only batches tell them apart."""
    pieces = pieces_of(drawn)
    tallies = [tally(piece, 1, function) for piece in pieces]
    together, whole = merge_tallies(tallies), tally(torch.cat(pieces), 1, function)
    assert (together.samples, together.batches, together.counted) == (whole.samples, len(pieces), whole.counted)
    for name in ("low", "high", "flat", "dead_flat", "never_flat"):
        assert np.array_equal(getattr(together, name), getattr(whole, name)), name
    same(reduce(lambda a, b: a.merge(b), tallies), together)
    same(tallies[0].merge(merge_tallies(tallies[1:])), together)
    same(together.merge(UnitTally.empty(4, function)), together)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.sampled_from(FUNCTIONS))
def test_ranks_merge_arrays(drawn: list[tuple[int, int, float]], function: str | None) -> None:
    """Maxima and sums over ranks give the merged tally, NaN and a silent rank included."""
    pieces = pieces_of(drawn)
    pieces[0][0, 1] = math.nan
    tallies = [*(tally(piece, 1, function) for piece in pieces), UnitTally.empty(4, function)]
    maxima, sums = zip(*(part.to_arrays() for part in tallies), strict=True)
    assert not np.isnan(maxima).any(), "what a maximum makes of NaN is up to the collective"
    same(UnitTally.from_arrays(np.maximum.reduce(maxima), np.add.reduce(sums), function), merge_tallies(tallies))


def test_tallies_of_other_units_are_left_out() -> None:
    """When a module has changed its units within a step, the newest stand alone."""
    old, new = tally(torch.ones(3, 2), 1, "relu"), tally(torch.ones(5, 4), 1, "relu")
    assert not old.fits(new)
    same(merge_tallies([old, new]), new)
