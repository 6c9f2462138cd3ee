"""Windows of units: when something may be said, what it is worth, and who was born and who died."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.config import Config
from instrument.diagnose.units import UnitStatus, UnitWindows, decode, encode
from instrument.diagnose.units.window import Span
from instrument.errors import RunError
from instrument.measure.batch import Batch, Column, measure_later
from instrument.measure.groups import ArrivingGroup
from instrument.measure.pending import PLACES
from instrument.measure.slopes import slopes_named
from instrument.measure.units import UnitTally, merge_tallies, tally_rows, tally_units
from instrument.record.buffer import StepRecord
from instrument.record.tallies import Tallies, Tally
from instrument.torch_private import Unseen

DEAD, ALIVE = -1.0, 1.0


def record(step: int, values: Iterable[float], samples: int = 8, function: str | None = "relu") -> StepRecord:
    """A step in which each unit of the module `act` had one value on all samples."""
    z = torch.tensor([list(values)] * samples)
    tally = tally_units(z, 1, slopes_named(function) if function else None)
    assert isinstance(tally, UnitTally)
    return StepRecord(step, {}, 0.0, units={"act": tally})


def rows(step: int, values: Iterable[float], name: str = "fc.weight", samples: int = 8) -> StepRecord:
    """A step in which each row of a weight's gradient had one value."""
    tally = tally_rows(torch.tensor([list(values)] * 3).T, 0, samples)
    assert isinstance(tally, UnitTally)
    return StepRecord(step, {}, 0.0, units={name: tally})


def windows(samples: int = 32, batches: int = 4) -> UnitWindows:
    return UnitWindows(Config(dead_window_samples=samples, dead_window_batches=batches))


def after(followed: UnitWindows, *records: StepRecord, name: str = "act") -> UnitStatus:
    for one in records:
        followed.add(one)
    return followed.status()[name]


def test_nothing_is_said_before_a_window_is_full() -> None:
    """Three batches of eight in a window of four and 32: watching, no unit named; the fourth decides."""
    followed = windows()
    early = after(followed, *(record(step, [DEAD, ALIVE]) for step in range(3)))
    assert (early.verdict, early.dead, early.always_on, early.samples, early.batches) == ("watching", (), (), 24, 3)
    full = after(followed, record(3, [DEAD, ALIVE]))
    assert (full.verdict, full.dead, full.always_on, full.samples, full.batches) == ("dead", (0,), (1,), 32, 4)
    assert (full.first_step, full.last_step) == (0, 3)


def test_one_large_batch_is_no_window() -> None:
    """A batch of a million samples is one batch: no unit is called dead on its evidence."""
    status = after(windows(samples=4096, batches=32), record(0, [DEAD], samples=1_000_000))
    assert (status.verdict, status.dead) == ("watching", ())


def test_many_small_batches_are_no_window() -> None:
    """Hundreds of batches of one sample do not make 4096 samples."""
    followed = windows(samples=4096, batches=32)
    assert after(followed, *(record(step, [DEAD], samples=1) for step in range(200))).verdict == "watching"


def test_the_bound_is_the_rule_of_three() -> None:
    """Silence on n samples bounds the rate by 3/n: (1 - 3/n)**n is 5 % for large n; small n bound nothing."""
    status = after(windows(), *(record(step, [DEAD], samples=1024) for step in range(4)))
    assert status.rate_bound == 3 / 4096
    assert (1 - status.rate_bound) ** status.samples == pytest.approx(0.05, rel=0.01)
    assert after(windows(), record(0, [DEAD], samples=2)).rate_bound == 1.0


def test_one_sign_of_life_is_enough() -> None:
    """A unit that fired once in the window is not dead, and it is rare below one sample in a hundred."""
    z = torch.full((64, 1), DEAD)
    z[17] = ALIVE
    fired = tally_units(z, 1, slopes_named("relu"))
    assert isinstance(fired, UnitTally)
    followed = windows(samples=256)
    silent = [record(step, [DEAD], samples=64) for step in range(1, 4)]
    status = after(followed, StepRecord(0, {}, 0.0, units={"act": fired}), *silent)
    assert (status.verdict, status.dead, status.rare) == ("ok", (), (0,))
    assert status.saturated == (round(255 / 256, 4),)


def test_the_window_is_never_empty_and_never_old() -> None:
    """Once full the evidence stays between one window and one and a quarter, and old life is forgotten in time."""
    followed = windows(samples=64, batches=8)
    after(followed, *(record(step, [ALIVE]) for step in range(8)))
    seen = []
    for step in range(8, 32):
        status = after(followed, record(step, [DEAD]))
        seen.append(status.verdict)
        assert 64 <= status.samples <= 80
        assert status.last_step == step
        assert status.first_step is not None
        assert step - status.first_step + 1 == status.batches
    assert seen[:7] == ["ok"] * 7  # a window of eight is not over yet
    assert seen[9:] == ["dead"] * len(seen[9:])


def test_births_deaths_and_what_stays() -> None:
    """Windows that do not overlap are compared: unit 1 is born, unit 2 dies, of two dead one is dead still."""
    followed = windows()
    first = after(followed, *(record(step, [DEAD, DEAD, ALIVE, ALIVE]) for step in range(4)))
    assert (first.windows, first.births, first.deaths, first.still_dead) == (1, (), (), None)
    between = after(followed, *(record(step, [DEAD, ALIVE, DEAD, ALIVE]) for step in range(4, 7)))
    assert (between.windows, between.births, between.still_dead) == (1, (), None)
    second = after(followed, record(7, [DEAD, ALIVE, DEAD, ALIVE]))
    assert (second.windows, second.births, second.deaths, second.still_dead) == (2, (1,), (2,), 0.5)
    third = after(followed, *(record(step, [ALIVE] * 4) for step in range(8, 12)))
    assert (third.windows, third.births, third.deaths, third.still_dead) == (0, (0, 2), (), 0.0)
    fourth = after(followed, *(record(step, [ALIVE] * 4) for step in range(12, 16)))
    assert (fourth.births, fourth.still_dead) == ((), None)


def test_constant_units() -> None:
    """A unit whose range over the window is a millionth of the layer's scale is constant, whatever the module."""
    followed = windows()
    for step in range(4):
        z = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        z[:, 1] = 3.0
        z[:, 2] = 3.0 + torch.linspace(0, 1e-7, 8) + 4e-7 * (step == 3)
        z[:, 3] = 3.0 + 1e-3 * step  # constant in each step, and not over the window
        tally = tally_units(z, 1, None)
        assert isinstance(tally, UnitTally)
        followed.add(StepRecord(step, {}, 0.0, units={"act": tally}))
    status = followed.status()["act"]
    assert (status.constant, status.dead, status.verdict) == ((1, 2), (), "ok")
    assert (status.function, status.saturated, status.rate) == (None, (), ())


def test_a_layer_of_zeros_is_constant_and_infinite_scales_hide_nothing() -> None:
    """Zeros alone have no scale and are constant all the same; an infinity makes no other unit constant."""
    zeros = after(windows(), *(record(step, [0.0, 0.0], function=None) for step in range(4)))
    assert zeros.constant == (0, 1)
    followed = windows()
    z = torch.tensor([[1.0, float("inf")], [2.0, 1.0]] * 4)
    tally = tally_units(z, 1, None)
    assert isinstance(tally, UnitTally)
    for step in range(4):
        followed.add(StepRecord(step, {}, 0.0, units={"act": tally}))
    assert followed.status()["act"].constant == ()


def test_rates_are_of_the_last_interval() -> None:
    """Rates begin anew whenever units were judged, so that a picture of them is no running mean."""
    followed = windows()
    alive = after(followed, *(record(step, [ALIVE, DEAD]) for step in range(1, 5)))
    assert alive.rate == (1.0, 0.0)
    followed.judge()
    silent = after(followed, *(record(step, [DEAD, ALIVE]) for step in range(5, 7)))
    assert silent.rate == (0.0, 1.0)
    mixed = after(followed, record(7, [ALIVE, ALIVE]), record(8, [ALIVE, ALIVE]))
    assert mixed.rate == (0.5, 1.0)


def test_rows_are_the_evidence_of_the_module_that_has_them() -> None:
    """Zero rows of `fc.weight` are dead units of `fc`, said to be told by gradient rows; rates are of steps."""
    followed = windows()
    status = after(followed, *(rows(step, [0.0, 1.0, float(step == 2)]) for step in range(1, 5)), name="fc")
    assert (status.name, status.witness, status.function) == ("fc", "gradient rows", None)
    assert (status.verdict, status.dead, status.rate) == ("dead", (0,), (0.0, 1.0, 0.25))
    assert (status.rare, status.saturated, status.constant, status.samples) == ((), (), (), 32)


def test_ranges_and_rows_of_one_module_join() -> None:
    """Where the output's range is known besides, constant units come from that and dead ones from the rows."""
    followed = windows()
    for step in range(4):
        z = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        z[:, 2] = 1.0
        tally = tally_units(z, 1, None)
        assert isinstance(tally, UnitTally)
        followed.add(StepRecord(step, {}, 0.0, units={"fc": tally, **rows(step, [0.0, 1.0, 1.0]).units}))
    status = followed.status()["fc"]
    assert (status.witness, status.dead, status.constant) == ("gradient rows", (0,), (2,))
    assert list(followed.status()) == ["fc"]


def test_rows_without_a_gradient_are_no_data() -> None:
    """A layer whose gradient is always zero in whole is no data, and leaves what its range tells alone."""
    followed = windows()
    frozen = after(followed, *(rows(step, [0.0, 0.0]) for step in range(6)), name="fc")
    assert (frozen.verdict, frozen.dead, frozen.units, frozen.samples) == ("no-data", (), 2, 0)
    assert (frozen.rate_bound, frozen.first_step, frozen.witness) == (1.0, None, "gradient rows")
    ranged = [record(step, [1.0, 2.0], function=None) for step in range(6, 12)]
    for one in ranged:
        followed.add(StepRecord(one.step, {}, 0.0, units={"fc": one.units["act"]}))
    assert (followed.status()["fc"].verdict, followed.status()["fc"].witness) == ("ok", "activations")


def test_steps_without_a_sample_count_for_nothing() -> None:
    """An expert that saw no token in most steps is judged by those in which it did."""
    followed = windows()
    for step in range(16):
        tally = record(step, [DEAD, ALIVE]).units["act"] if step % 4 == 0 else UnitTally.empty(2, "relu")
        followed.add(StepRecord(step, {}, 0.0, units={"act": tally}))
    status = followed.status()["act"]
    assert (status.verdict, status.dead, status.samples, status.batches) == ("dead", (0,), 32, 4)


def test_a_module_that_changed_begins_anew() -> None:
    """Other units, or another function, are not mixed with those before."""
    followed = windows()
    after(followed, *(record(step, [DEAD, DEAD]) for step in range(8)))
    changed = after(followed, record(8, [DEAD, DEAD, DEAD]))
    assert (changed.verdict, changed.units, changed.samples, changed.windows) == ("watching", 3, 8, 0)
    assert after(followed, record(9, [DEAD] * 3, function="tanh")).samples == 8


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([DEAD, ALIVE]), min_size=3, max_size=3), min_size=1, max_size=30))
def test_dead_is_silence_over_the_evidence(history: list[list[float]]) -> None:
    """At every moment the dead are those that were silent from the first step of the evidence to the last."""
    followed = windows(samples=16, batches=2)
    for step, values in enumerate(history):
        status = after(followed, record(step, values, samples=4))
        assert status.first_step is not None
        evidence = np.array(history[status.first_step : step + 1])
        assert status.batches == len(evidence)
        silent = tuple(np.flatnonzero((evidence == DEAD).all(axis=0)).tolist())
        assert status.dead == (silent if len(evidence) >= 4 else ())


def test_statuses_survive_a_file() -> None:
    """What is written reads back equal, as JSON, and unknown keys of a later version are passed over."""
    followed = windows()
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    tally = tally_units(z, 1, slopes_named("tanh"))
    assert isinstance(tally, UnitTally)
    for step in range(9):
        followed.add(StepRecord(step, {}, 0.0, units={"act": tally, **rows(step, [0.0, 1.0]).units}))
    statuses = followed.status()
    assert decode(encode(statuses)) == statuses
    values = json.loads(json.dumps(statuses["act"].as_dict()))
    assert UnitStatus.from_dict({**values, "from a later version": 1}) == statuses["act"]


@pytest.mark.parametrize("data", [b"", b"no zlib", encode({})[:-3], b"x\x9c+\x04\x00\x00r\x00r"])
def test_torn_statuses(data: bytes) -> None:
    """What is no status is refused with one clear error."""
    with pytest.raises(RunError, match="statuses of units cannot be read"):
        decode(data)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_span_is_the_tallies_of_its_steps_merged(data: st.DataObject) -> None:
    """However often the same tally comes in a row, and whatever a span was asked for meanwhile, it is all merged."""
    function = data.draw(st.sampled_from([None, "relu", "tanh"]))
    seeds = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    made: dict[int, UnitTally] = {}
    for seed in seeds:
        z = torch.randn((seed + 1, 5), generator=torch.Generator().manual_seed(seed))
        z[:, 1] -= 4.0
        tally = tally_units(z, 1, slopes_named(function) if function else None)
        assert isinstance(tally, UnitTally)
        made.setdefault(seed, tally)
    tallies = [made[seed] for seed in seeds]
    span = Span(0, tallies[0])
    for step, tally in enumerate(tallies[1:], 1):
        if data.draw(st.booleans()):
            before = span.tally
            kept = (before.low.copy(), before.flat.copy(), before.dead_flat.copy())
            span.add(step, tally)
            after = (before.low, before.flat, before.dead_flat)
            assert all((one == other).all() for one, other in zip(kept, after, strict=True))
        else:
            span.add(step, tally)
    found, expected = span.tally, merge_tallies(tallies)
    assert (found.samples, found.batches, found.counted) == (expected.samples, expected.batches, expected.counted)
    assert (found.function, found.witness, span.last_step) == (expected.function, expected.witness, len(seeds) - 1)
    for one, other in zip(
        (found.low, found.high, found.flat, found.dead_flat, found.never_flat),
        (expected.low, expected.high, expected.flat, expected.dead_flat, expected.never_flat),
        strict=True,
    ):
        assert one.tolist() == other.tolist()
    assert found.square_mean == pytest.approx(expected.square_mean, rel=1e-12)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_modules_followed_together_are_judged_as_one_by_one(data: st.DataObject) -> None:
    """Whichever modules run on a step, on how many samples, with a nonlinearity or not, and however often one runs."""
    one_by_one, together = windows(64, 8), windows(64, 8)
    names = ["a", "b", "c", "d"]
    for step in range(data.draw(st.integers(1, 30))):
        is_usual = data.draw(st.integers(0, 15))
        ran = names if is_usual else data.draw(st.permutations([*names, "e"]).map(lambda every: every[:3]))
        samples, batch = data.draw(st.sampled_from([8, 8, 5])), Batch()
        alone: dict[str, UnitTally] = {}
        waiting: dict[str, int | Tally | list[Tally]] = {}
        groups: list[ArrivingGroup] = []
        for name in ran:
            units = 2 if is_usual else data.draw(st.integers(2, 3))
            function = "relu" if name == "d" else None
            z = torch.randn((samples, units), generator=torch.Generator().manual_seed(step))
            z[:, 0] = ord(name)
            if name == "c" and data.draw(st.booleans()):
                z[0, 1] = data.draw(st.sampled_from([math.nan, math.inf, 1e-9]))
            slopes = slopes_named(function) if function else None
            tally = tally_units(z, 1, slopes)
            assert isinstance(tally, UnitTally)
            group, place = batch.put(z)
            assert isinstance(group, ArrivingGroup)
            number = group.tally(place, tuple(z.shape), 1, slopes)
            assert number is not None
            if group not in groups:
                groups.append(group)
            if data.draw(st.integers(0, 9)) == 0:  # ran twice
                alone[name], waiting[name] = tally.merge(tally), [group.late(number), group.late(number)]
            else:
                alone[name], waiting[name] = tally, groups.index(group) * PLACES + number
            if data.draw(st.integers(0, 3)) == 0:
                batch.cut()
        one_by_one.add(StepRecord(step, {}, 0.0, units=alone))
        together.add(StepRecord(step, {}, 0.0, units=Tallies(waiting, groups)))
        if data.draw(st.booleans()):
            expected, found = one_by_one.judge(), together.judge()
            assert list(found) == list(expected)
            assert found == expected


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_gradients_followed_together_are_judged_as_one_by_one(data: st.DataObject) -> None:
    """Whichever have rows of zeros on a step, some or all, on how many samples, of whatever size, or are not there."""
    one_by_one, together = windows(64, 8), windows(64, 8)
    names = [f"{layer}.weight" for layer in "abcde"]
    for step in range(data.draw(st.integers(1, 40))):
        is_usual = data.draw(st.integers(0, 7))
        ran = names if is_usual else data.draw(st.permutations([*names, "f.weight"]).map(lambda every: every[:4]))
        gradients, samples = [], []
        for name in ran:
            gradient = torch.ones(3 if is_usual else data.draw(st.integers(3, 4)), 2)
            kinds = ["zero" if name < "b" else "some" if name > "e" and step > 20 else "alive"] * 12
            kind = data.draw(st.sampled_from([*kinds, "zero", "some"]))
            gradient[: {"alive": 0, "some": 1, "zero": 4}[kind]] = 0.0
            gradients.append(gradient)
            samples.append(data.draw(st.sampled_from([8] * 20 + [5])) if not is_usual else 8)
        column = Column()
        measure_later(gradients, column=column)
        (group,) = column.groups
        first = group.rows(range(len(ran)), [len(gradient) for gradient in gradients], samples)
        assert first is not None
        with Unseen():
            made = [tally_rows(gradient, 0, of) for gradient, of in zip(gradients, samples, strict=True)]
        alone = {name: tally for name, tally in zip(ran, made, strict=True) if isinstance(tally, UnitTally)}
        assert len(alone) == len(ran)
        one_by_one.add(StepRecord(step, {}, 0.0, units=alone))
        together.add(StepRecord(step, {}, 0.0, units=Tallies(dict(zip(ran, range(first, 99), strict=False)), [group])))
        if data.draw(st.integers(0, 3)) == 0:
            expected, found = one_by_one.judge(), together.judge()
            assert list(found) == list(expected)
            assert found == expected
    assert together.status() == one_by_one.status()


def test_a_gradient_that_leaves_the_others_knows_the_windows_before() -> None:
    """A row that is silent for a window, behind one in which none was, has died; beside those that were never seen."""
    followed = windows(64, 8)
    for step in range(16):
        gradient = torch.ones(3, 2)
        gradient[0] = step < 8
        column = Column()
        measure_later([gradient, torch.ones(3, 2)], column=column)
        (group,) = column.groups
        first = group.rows([0, 1], [3, 3], [8, 8])
        assert first is not None
        followed.add(StepRecord(step, {}, 0.0, units=Tallies({"a.weight": first, "b.weight": first + 1}, [group])))
    found = followed.status()
    assert (found["a"].dead, found["a"].deaths, found["a"].windows) == ((0,), (0,), 1)
    assert (found["b"].dead, found["b"].deaths, found["b"].windows) == ((), (), 0)


def test_hundreds_of_modules_are_followed_together() -> None:
    """No tally is made of any; a unit that is the same on all samples of a step, and another on the next, varies."""
    followed = windows()
    for step in range(12):
        batch, waiting = Batch(), {}
        for number in range(40):
            group, place = batch.put(torch.full((4, 3), float(step % 2)))
            assert isinstance(group, ArrivingGroup)
            tally = group.tally(place, (4, 3), 1, None)
            assert tally is not None
            waiting[f"layers.{number}"] = tally
        assert isinstance(group, ArrivingGroup)
        tallies = Tallies(waiting, [group])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Tallies, "__getitem__", lambda self, name: pytest.fail(f"{name} was made"))
            followed.add(StepRecord(step, {}, 0.0, units=tallies))
    found = followed.status()
    assert len(found) == 40
    assert {(s.samples, s.batches, s.verdict, s.constant) for s in found.values()} == {(32, 8, "ok", ())}


def test_hundreds_of_gradients_are_followed_together() -> None:
    """No tally is made of any that has no row of zeros on any step, or was always zero; of one that is new once, is."""
    followed = windows()
    made: list[str] = []
    get = Tallies.__getitem__

    def counted(self: Tallies, name: str) -> UnitTally:
        made.append(name)
        return get(self, name)

    names = [f"layers.{number}.weight" for number in range(40)]
    gradients = [torch.ones(3, 2) if number >= 10 else torch.zeros(3, 2) for number in range(40)]
    for step in range(12):
        if step == 6:
            gradients[20] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        column = Column()
        measure_later(gradients, column=column)
        (group,) = column.groups
        first = group.rows(range(40), [3] * 40, [4] * 40)
        assert first is not None
        tallies = Tallies(dict(zip(names, range(first, first + 40), strict=True)), [group])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Tallies, "__getitem__", counted)
            followed.add(StepRecord(step, {}, 0.0, units=tallies))
    assert made == ["layers.20.weight"] * 6
    found = followed.status()
    assert {found[f"layers.{number}"].verdict for number in range(10)} == {"no-data"}
    assert {(s.samples, s.batches, s.verdict) for s in list(found.values())[10:] if s.name != "layers.20"} == {
        (32, 8, "ok")
    }
    assert found["layers.20"].rate == pytest.approx((0.5, 1.0, 1.0))


def test_units_whose_tally_fails_are_left_out_and_the_others_are_not(recwarn: pytest.WarningsRecorder) -> None:
    """A fault at one module is told once and costs that module its verdict, not the network."""

    class Failing(dict[str, UnitTally]):
        def __getitem__(self, name: str) -> UnitTally:
            if name == "bad":
                raise ZeroDivisionError("deliberate")
            return super().__getitem__(name)

    followed = windows()
    for step in range(6):
        good = record(step, [DEAD, ALIVE]).units["act"]
        followed.add(StepRecord(step, {}, 0.0, units=Failing(bad=good, act=good)))
    assert list(followed.status()) == ["act"]
    assert followed.status()["act"].dead == (0,)
    told = [str(warning.message) for warning in recwarn if "bad" in str(warning.message)]
    assert len(told) == 1
