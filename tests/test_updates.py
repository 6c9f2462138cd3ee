"""What a step changes of parameters, many small ones together, against float64 NumPy and against one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import instrument
from instrument.capture.parameters import Pairs, Parameters
from instrument.measure.groups import Later
from instrument.measure.small import SMALL
from instrument.watcher.updates import Updates

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def told(updates: Updates, pairs: Pairs) -> dict[str, np.ndarray[Any, Any]]:
    """Name to change, in float64, however it is told."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    together = updates.together(pairs)
    if together is not None:
        sites, column = together
        for group in column.groups:
            for values in group._values().split(np.diff(group._ends, prepend=0).tolist()):
                found[sites[len(found)].name] = values.numpy()
    alone = {site.name: change.numpy() for site, change in updates.alone(pairs)}
    assert found.keys().isdisjoint(alone)
    return found | alone


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_changes_are_those_since_each_parameter_was_remembered_last(data: st.DataObject) -> None:
    """Of whichever parameters an optimizer has, one within another or not, of whatever type, size and layout."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2, 2), "d": (SMALL + 1,), "e": (0,), "f": (4, 3)}
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()})
    if data.draw(st.booleans()):
        model["f"] = nn.Parameter(torch.randn(3, 4).to(dtype).t())
    if data.draw(st.integers(0, 3)) == 0:
        model["b"] = nn.Parameter(torch.randn(5, dtype=torch.float64))
    updates = Updates(Parameters())
    before: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(data.draw(st.integers(1, 5))):
        names = sorted(data.draw(st.sets(st.sampled_from(list(shapes)), min_size=1)))
        updates.remember([(name, model[name]) for name in names], are_whole=data.draw(st.booleans()))
        before |= {name: model[name].detach().double().numpy().copy() for name in names}
        with torch.no_grad():
            for parameter in model.values():
                parameter.add_(torch.randn_like(parameter), alpha=data.draw(st.sampled_from([0.0, 1.0, 1e-3])))
        if data.draw(st.booleans()):
            ended = sorted(data.draw(st.sets(st.sampled_from(list(before)), min_size=1))) if before else []
            found = told(updates, [(name, model[name]) for name in ended])
            assert found.keys() == set(ended)
            for name, change in found.items():
                after = model[name].detach().double().numpy()
                expected = after - before.pop(name)
                order = expected.T if not model[name].is_contiguous() else expected
                np.testing.assert_allclose(change, order.ravel(), rtol=0, atol=0)


def test_small_parameters_are_told_together() -> None:
    """Those of one type by one tensor; what is large or empty by itself, and nothing twice."""
    sizes_of = {"a": (3,), "big": (SMALL + 1,), "b": (2, 2)}
    pairs = [(name, nn.Parameter(torch.ones(shape))) for name, shape in sizes_of.items()]
    updates = Updates(Parameters())
    updates.remember(pairs, are_whole=True)
    with torch.no_grad():
        pairs[0][1][1] += 2.0
    together = updates.together(pairs)
    assert together is not None
    sites, column = together
    assert [site.name for site in sites] == ["a", "b"]
    assert [(item.sketch().total, item.sketch().zero_count) for item in column if isinstance(item, Later)] == [
        (2, 2),
        (0, 4),
    ]
    assert [site.name for site, _ in updates.alone(pairs)] == ["big"]
    assert updates.together(pairs) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_watch_has_the_updates_of_small_parameters(dtype: torch.dtype, tmp_path: Path) -> None:
    """Mean, size and count of zeros of each, beside those of NumPy, on every step; one that stays is zero in whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)).to(dtype)
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.5)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.0})
    watcher = instrument.watch(model, kinds=["updates"], interval=1, logdir=tmp_path, strict=True)
    expected = []
    for _ in range(3):
        before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=dtype)).square().mean().backward()
        optimizer.step()
        expected.append({name: p.detach().double().numpy() - before[name] for name, p in model.named_parameters()})
    watcher.close()
    for record, truth in zip(watcher.history, expected, strict=True):
        assert set(record) == {f"Updates/{name}" for name in truth}
        for name, change in truth.items():
            sketch = record[f"Updates/{name}"]
            assert sketch.count == change.size
            assert sketch.zero_count == (change == 0).sum()
            assert sketch.mean == pytest.approx(change.mean(), rel=1e-12, abs=1e-15)
            assert sketch.rms == pytest.approx(np.sqrt(np.square(change).mean()), rel=1e-12)
        assert record["Updates/2.weight"].zero_count == 4


def test_updates_stand_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Small parameters are measured together and large ones alone, and each record has them as the model does."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, SMALL), nn.Linear(SMALL, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, kinds=["updates", "parameters"], interval=1, logdir=tmp_path, strict=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
    watcher.close()
    names = [name for name, _ in model.named_parameters()]
    for record in watcher.history:
        assert list(record) == [f"{section}/{name}" for section in ("Updates", "Parameters") for name in names]
