"""Where two runs part: differences planted at a known layer and step, and none where there is none."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import instrument
from instrument.diagnose.compare import NON_FINITE, Comparison, compare
from instrument.errors import RunError
from instrument.record.reading import Scalars, read_scalars
from instrument.record.tags import Tag

STEPS = range(0, 400, 4)
LAYERS = ("embed", "blocks.0", "blocks.1", "blocks.2", "head")


def synthetic(seed: int, noise: float = 0.1, offset: float = 0.0, trend: float = -1.5) -> Scalars:
    """A run of five layers: activations and gradients that fall by a known trend, with independent noise."""
    random = np.random.default_rng(seed)
    scalars: Scalars = {}
    for depth, layer in enumerate(LAYERS):
        for kind, name in (("activations", layer), ("gradients", f"{layer}.weight")):
            for statistic in ("rms", "std"):
                start = math.exp(offset * random.standard_normal())
                scalars[Tag(kind, statistic, name)] = {
                    step: start * (depth + 1) * math.exp(trend * step / 400 + noise * random.standard_normal())
                    for step in STEPS
                }
    return scalars


def planted(scalars: Scalars, tag: Tag, first_step: int, factor: float, steps: int = 10**9) -> Scalars:
    """The same, with one statistic multiplied for some steps."""
    return {
        each: {
            step: value * (factor if each == tag and first_step <= step < first_step + steps else 1.0)
            for step, value in values.items()
        }
        for each, values in scalars.items()
    }


TAG = Tag("activations", "rms", "blocks.1")


@pytest.mark.parametrize("factor", [1.06, 0.9, 30.0])
@pytest.mark.parametrize("step", [0, 40, 200])
def test_runs_that_begin_alike_part_where_it_was_planted(step: int, factor: float) -> None:
    """With the same seed a difference above 5 % is found at its layer and its very step, however noisy both are."""
    first = synthetic(0, noise=0.5)
    found = compare(first, planted(first, TAG, step, factor))
    assert found.alike
    assert [(each.kind, each.statistic, each.name, each.step) for each in found.partings] == [(*TAG, step)]
    assert found.partings[0].ratio == pytest.approx(factor)
    assert found.sentence().startswith(f"The runs part at step {step}, first in the activations of blocks.1: rms ")


def test_equal_runs_do_not_part() -> None:
    """A run and itself have nothing between them, and the sentence says what was compared."""
    found = compare(synthetic(0), synthetic(0))
    assert found.partings == ()
    assert found.sentence() == (
        "The runs do not part: 20 statistics from step 0 to step 396 stay together. "
        "They begin alike, so more than 5 % counts."
    )


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.02, 0.1, 0.3]), st.sampled_from([0.01, 0.1]))
def test_other_noise_and_other_beginnings_are_no_parting(seed: int, noise: float, offset: float) -> None:
    """Runs of one recipe with other seeds, of any noise, do not part: of twenty statistics one at most is an error."""
    found = compare(synthetic(seed, noise, offset), synthetic(seed + 1, noise, offset))
    assert not found.alike
    assert len(found.partings) <= 1


def test_a_head_start_is_no_parting() -> None:
    """A run that does the same a quarter faster does not part, although it is a factor of 4.5 away in the end."""
    found = compare(synthetic(0, 0.01, 0.01, trend=-6.0), synthetic(1, 0.01, 0.01, trend=-7.5))
    assert found.partings == ()


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_runs_that_begin_differently_part_soon_after_it_was_planted(noise: float) -> None:
    """A factor of thirty is found at its layer and step among runs of other seeds, and nothing is found elsewhere."""
    found = compare(synthetic(0, noise, 0.05), planted(synthetic(1, noise, 0.05), TAG, 200, 30.0))
    assert not found.alike
    assert [(each.kind, each.statistic, each.name, each.step) for each in found.partings] == [(*TAG, 200)]


def test_a_different_start_is_told_at_the_first_step() -> None:
    """A layer that begins three times as large parts at the first common step."""
    found = compare(synthetic(0, 0.02, 0.02), planted(synthetic(1, 0.02, 0.02), TAG, 0, 3.0))
    assert [(each.name, each.step) for each in found.partings] == [("blocks.1", 0)]


@pytest.mark.parametrize("steps", [4, 8])
def test_one_or_two_steps_are_an_outlier(steps: int) -> None:
    """A difference at one or two common steps is no parting; at three it is."""
    first = synthetic(0)
    assert compare(first, planted(first, TAG, 200, 50.0, steps=steps)).partings == ()
    assert compare(first, planted(first, TAG, 200, 50.0, steps=12)).partings[0].step == 200


def test_partings_of_one_step_come_as_they_come_about() -> None:
    """Within a step the forward pass comes first, in the order of layers, then the backward pass, last layer first."""
    first = synthetic(0)
    second = {tag: {step: value * (1 if step < 40 else 2) for step, value in values.items()}
              for tag, values in first.items() if tag.statistic == "rms"}  # fmt: skip
    found = compare(first, second)
    assert [each.name for each in found.partings] == [*LAYERS, *(f"{layer}.weight" for layer in reversed(LAYERS))]
    assert [(each.layer, each.kind) for each in found.by_layer()] == [(layer, "activations") for layer in LAYERS]


def test_values_that_turn_nan_in_one_run_part_there() -> None:
    """NaN in one run only is a parting at its first step, even where the statistics of what is finite agree."""
    first = synthetic(0)
    second = {**first, Tag("activations", "nan_count", "blocks.2"): {200: 5.0, 204: 0.0}}
    for found, values in ((compare(first, second), (0.0, 5.0)), (compare(second, first), (5.0, 0.0))):
        (parting,) = found.partings
        assert (parting.statistic, parting.name, parting.step) == (NON_FINITE, "blocks.2", 200)
        assert (parting.first, parting.second, parting.ratio) == (*values, None)
    assert f"{5} values are NaN or Inf in A, 0 in B" in found.sentence()
    assert compare(second, second).partings == ()


def test_zero_and_infinity_are_compared_too() -> None:
    """A gradient that becomes exactly zero in one run, or leaves float32, parts; where both are zero they agree."""
    first = synthetic(0)
    zero, huge = planted(first, TAG, 200, 0.0), planted(first, TAG, 200, math.inf)
    assert [(each.step, each.second) for each in compare(first, zero).partings] == [(200, 0.0)]
    assert [(each.step, each.second) for each in compare(first, huge).partings] == [(200, math.inf)]
    assert compare(zero, zero).partings == ()
    assert compare(huge, huge).partings == ()
    (parting,) = compare(zero, first).partings
    assert parting.ratio is None


def test_only_common_steps_are_compared() -> None:
    """Runs that were sampled at other steps are compared at those they share, and the span of these is told."""
    first = synthetic(0)
    second = {tag: {step: value for step, value in values.items() if step % 12 == 0 and step < 200}
              for tag, values in first.items()}  # fmt: skip
    found = compare(first, planted(second, TAG, 100, 2.0))
    assert found.steps == (0, 192)
    assert [each.step for each in found.partings] == [108]


def test_runs_with_nothing_in_common_are_refused() -> None:
    """No common statistic and no common step are told apart, with what each run has."""
    first = synthetic(0)
    other = {Tag("gradients", "rms", "encoder.weight"): {0: 1.0}}
    with pytest.raises(RunError, match=r"no statistic in common: the first has activations of embed and 9 more, "
                                       r"the second gradients of encoder\.weight$"):  # fmt: skip
        compare(first, other)
    later = {tag: {step + 1: value for step, value in values.items()} for tag, values in first.items()}
    with pytest.raises(RunError, match="no step in common: the first has steps 0 to 396, the second 1 to 397"):
        compare(first, later)


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["alike", "different"]))
def test_comparing_the_other_way_round_finds_the_same(seed: int, how: str) -> None:
    """Partings do not depend on which run is given first; their ratios are each other's inverse."""
    first = synthetic(seed, 0.05, 0.05)
    second = planted(first if how == "alike" else synthetic(seed + 1, 0.05, 0.05), TAG, 200, 9.0)
    forth, back = compare(first, second), compare(second, first)
    assert [(each.name, each.step) for each in forth.partings] == [(each.name, each.step) for each in back.partings]
    for one, other in zip(forth.partings, back.partings, strict=True):
        assert one.ratio is not None
        assert other.ratio == pytest.approx(1 / one.ratio)


def test_shifting_the_scale_of_both_changes_nothing() -> None:
    """Units do not matter: both runs a thousand times larger part at the same places."""
    first, second = synthetic(0, 0.05, 0.05), planted(synthetic(1, 0.05, 0.05), TAG, 200, 9.0)
    large = [{tag: {step: 1000 * value for step, value in values.items()} for tag, values in run.items()}
             for run in (first, second)]  # fmt: skip
    assert [each.step for each in compare(*large).partings] == [each.step for each in compare(first, second).partings]


def trained(logdir: Path, seed: int, change: tuple[int, float] | None = None) -> Scalars:
    """A run on eight features, whose learning rate is multiplied from a step on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with instrument.watch(model, interval=100, scalar_interval=1, logdir=logdir, strict=True):
        for step in range(100):
            if change is not None and step == change[0]:
                optimizer.param_groups[0]["lr"] *= change[1]
            x = torch.randn(64, 8)
            loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return read_scalars(logdir)


def test_real_runs_part_after_the_learning_rate_changed(tmp_path: Path) -> None:
    """Two trainings of one seed part within a few steps of the change; two seeds of one recipe do not part."""
    first = trained(tmp_path / "a", 0)
    changed = compare(first, trained(tmp_path / "b", 0, (40, 30.0)))
    assert changed.alike
    assert 40 <= changed.partings[0].step <= 43
    assert compare(first, trained(tmp_path / "c", 0)).partings == ()
    other = compare(first, trained(tmp_path / "d", 1))
    assert not other.alike
    assert len(other.partings) <= 1


def printed(found: Comparison) -> str:
    console = Console(file=io.StringIO(), width=100)
    found.print_to(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_people_get_a_sentence_and_a_table_and_programs_get_json() -> None:
    """The table has a row a layer; as JSON it holds every parting."""
    first = synthetic(0)
    found = compare(first, planted(planted(first, TAG, 40, 2.0), Tag("gradients", "std", "head.weight"), 80, 4.0))
    lines = [line.split() for line in printed(found).splitlines() if line.strip()]
    assert lines[-2][:4] == ["blocks.1", "activations", "rms", "40"]
    assert lines[-2][-1] == "2"
    assert lines[-1][:5] == ["head", "weight", "gradients", "std", "80"]
    again = json.loads(json.dumps(found.as_dict()))
    assert [(each["name"], each["step"], round(each["ratio"], 6)) for each in again["partings"]] == [
        ("blocks.1", 40, 2.0), ("head.weight", 80, 4.0),
    ]  # fmt: skip
    assert again["steps"] == [0, 396]
