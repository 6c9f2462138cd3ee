"""Histograms of a part of the values, with statistics of all of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import instrument
from instrument.measure.custom_op import measure
from instrument.measure.narrow import MANY
from instrument.measure.sketch import merge_all

pytestmark = pytest.mark.usefixtures("engine")

EXACT = ("count", "low", "high", "zero_count", "nan_count", "inf_count", "total", "total_squares")


def values_of(shape: str, count: int = 400_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(count, generator=generator)
    if shape == "relu":
        return torch.relu(values)
    if shape == "broken":
        values[7], values[11], values[200_000] = math.nan, math.inf, -math.inf
    if shape == "rare":  # one value that no sample meets, among zeros
        return torch.zeros(count).index_fill_(0, torch.tensor([1]), 3.0)
    return values.view(400, -1).mT if shape == "strided" else values


@pytest.mark.parametrize("shape", ["normal", "relu", "broken", "rare", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("sample_above", [10_000, 100_000])
def test_statistics_are_of_all_values(shape: str, dtype: torch.dtype, sample_above: int) -> None:
    """Counts, zeros, NaN, Inf, extremes and sums are those without sampling; only the histogram is of a part."""
    if dtype is torch.int32 and shape == "broken":
        return
    values = (values_of(shape) * 10).to(dtype)
    sampled, whole = measure(values, sample_above), measure(values)
    assert [getattr(sampled, name) for name in EXACT] == [getattr(whole, name) for name in EXACT]
    assert whole.histogram_share == 1
    assert 0.5 * sample_above / values.numel() < sampled.histogram_share <= sample_above / values.numel()
    counts, edges = sampled.histogram()
    assert counts.sum() == whole.count
    assert (edges[0], edges[-1]) == (whole.min, whole.max)


@pytest.mark.parametrize("shape", ["normal", "relu"])
def test_quantiles_of_a_sample_are_near(shape: str) -> None:
    """Quantiles of a tenth of the values are those of all within the error of so large a sample."""
    values = values_of(shape)
    sampled = measure(values, 40_000)
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert sampled.quantile(q) == pytest.approx(float(np.quantile(values.numpy(), q)), abs=0.03)


def test_columns_are_not_visited_alike() -> None:
    """A matrix whose columns differ is sampled in all of them, though the step would divide its rows."""
    values = torch.arange(100.0).expand(4000, 100).contiguous()
    assert measure(values, 10_000).quantile(0.5) == pytest.approx(49.5, abs=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_tensors_of_sixteen_bits_are_never_sampled(dtype: torch.dtype) -> None:
    """Where counting all takes no more than counting some, the sketch is that of all."""
    values = torch.randn(MANY + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert measure(values[1:], 10_000).histogram_share < 0.02
    assert measure(values, 10_000) == measure(values)
    assert measure(values, 10_000).histogram_share == 1


def test_small_tensors_are_never_sampled() -> None:
    """A tensor of 8192 elements gains nothing by sampling and is counted whole."""
    assert measure(torch.randn(8192), 100).histogram_share == 1
    assert measure(torch.randn(8193), 100).histogram_share < 0.02


def test_the_share_is_told_and_merges_by_the_number_of_values() -> None:
    """The text of a sketch says what share was looked at; merged, shares weigh as their values do."""
    sampled, whole = measure(torch.ones(100_000), 20_000), measure(torch.ones(300_000))
    assert "histogram_share=" in repr(sampled)
    assert "histogram_share" not in repr(whole)
    merged = merge_all([sampled, whole])
    assert merged.histogram_share == pytest.approx((sampled.histogram_share + 3) / 4)
    assert merged.count == 400_000


def test_the_configuration_says_above_which_size(tmp_path: Path) -> None:
    """The key samples what is larger and labels it in the record; by default nothing is sampled."""
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shares = {}
    for size in (0, 9000):
        with instrument.watch(model, interval=1, config={"histogram_sample_above": size}, logdir=tmp_path) as watcher:
            model(torch.ones(100, 200)).mean().backward()
            optimizer.step()
            record = watcher.history[-1]
        shares[size] = {tag: sketch.histogram_share for tag, sketch in record.items() if sketch.histogram_share < 1}
    assert shares[0] == {}
    assert set(shares[9000]) == {"Parameters/0.weight", "Gradients/0.weight", "Activations/0"}
