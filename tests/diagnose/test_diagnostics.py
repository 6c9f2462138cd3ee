"""Every diagnostic on readings made by hand: it fires at the right place, and is silent just inside its threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose import diagnostics as d
from instrument.diagnose.findings import Level
from instrument.diagnose.readings import GLOBAL_L2, SKIPPED, ParameterTraits, Reading
from instrument.record.tags import Tag

from .making import MATRIX, ask, reading, series, status


class TestNonFinite:
    """Where NaN and Inf come from."""

    def test_the_first_offender_in_the_order_of_execution_is_named(self) -> None:
        """Of three tensors with NaN the first that was executed is named, with its number and the last clean step."""
        clean = reading(20, {("activations", "rms", "a"): 1.0, ("parameters", "rms", "a.weight"): 1.0})
        sick = reading(
            30,
            {
                ("activations", "rms", "a"): 1.0,
                ("activations", "rms", "b"): 1.0,
                ("activations", "nan_count", "b"): 5.0,
                ("activations", "nan_count", "c"): 9.0,
                ("gradients", "nan_count", "a.weight"): 9.0,
                ("parameters", "nan_count", "a.weight"): 9.0,
            },
        )
        (found,) = ask(d.non_finite, [clean, sick])
        assert (found.level, found.site, found.step) == (Level.CRIT, Site("activations", "b"), 30)
        assert (found.value, found.threshold, found.unit) == (5.0, 0.0, "values")
        assert "the output of b" in found.sentence
        assert "after step 20" in found.sentence
        assert ask(d.non_finite, [clean]) == []

    def test_inf_of_a_mask_is_no_fault_and_never_the_offender(self) -> None:
        """Inf in activations alone is silent; when NaN comes later, what was Inf before is not accused."""
        mask = {("activations", "inf_count", "mask"): 6.0, ("activations", "rms", "out"): 1.0}
        calm, sick = reading(0, mask), reading(10, {**mask, ("activations", "nan_count", "out"): 1.0})
        assert ask(d.non_finite, [calm]) == []
        (found,) = ask(d.non_finite, [calm, sick])
        assert found.site == Site("activations", "out")

    @pytest.mark.parametrize("evidence", ["the scaler's word", "finite parameters"])
    def test_a_skipped_step_is_worth_a_word_and_no_more(self, evidence: str) -> None:
        """Inf in gradients is INFO where the step was skipped, and CRIT where nothing says so."""
        values = {("gradients", "inf_count", "w"): 3.0}
        sick = reading(0, values)
        extra = {SKIPPED: 1.0} if evidence == "the scaler's word" else {Tag("parameters", "rms", "w"): 1.0}
        skipped = Reading(0, {**sick.values, **extra})
        assert ask(d.non_finite, [skipped]) == []
        (found,) = ask(d.skipped_step, [skipped])
        assert found.level == Level.INFO
        assert [found.level for found in ask(d.non_finite, [sick])] == [Level.CRIT]
        assert ask(d.skipped_step, [sick]) == []

    def test_a_loss_that_is_nan_alone_is_told(self) -> None:
        """Where every tensor is finite and the loss is not, what is computed between them is to blame."""
        (found,) = ask(d.non_finite, [reading(5, {("activations", "rms", "a"): 1.0}, loss=math.nan)])
        assert (found.level, found.site) == (Level.CRIT, None)
        assert "between the model's output and the loss" in found.sentence


class TestSpikes:
    """Loss and gradient norm."""

    @staticmethod
    def wavering(last: float, count: int = 40) -> list[float]:
        """Values whose log10 has mean 0 and standard deviation 0.1, and one more."""
        return [10.0 ** (0.1 * (-1) ** number) for number in range(count)] + [last]

    @pytest.mark.parametrize(("last", "told"), [(10**0.599, False), (10**0.601, True)])
    def test_six_deviations_of_the_logarithm_are_a_spike(self, last: float, told: bool) -> None:
        """Just above mean plus six standard deviations of log10 is a spike, just below is none."""
        norms = [Reading(step, {GLOBAL_L2: norm}) for step, norm in enumerate(self.wavering(last))]
        losses = [Reading(step, {}, loss=loss) for step, loss in enumerate(self.wavering(last))]
        for found in (ask(d.gradient_spike, norms), ask(d.loss_spike, losses)):
            assert len(found) == told
            if told:
                assert (found[0].level, found[0].site, found[0].step) == (Level.WARN, None, 40)
                assert found[0].value == last
                assert found[0].threshold == pytest.approx(10**0.6)

    def test_a_quarter_of_the_window_must_be_there(self) -> None:
        """After 31 readings nothing is said yet, after 32 it is."""
        for count, told in ((31, False), (32, True)):
            norms = [Reading(step, {GLOBAL_L2: norm}) for step, norm in enumerate(self.wavering(1e3, count))]
            assert bool(ask(d.gradient_spike, norms)) == told

    def test_a_norm_that_never_changes_must_double(self) -> None:
        """Where the window has no deviation at all, less than a doubling is no spike."""
        for last, told in ((1.99, False), (2.01, True)):
            norms = [Reading(step, {GLOBAL_L2: norm}) for step, norm in enumerate([1.0] * 40 + [last])]
            assert bool(ask(d.gradient_spike, norms)) == told

    @pytest.mark.parametrize(("clipped", "told"), [(20, False), (21, True)])
    def test_clipping_on_more_than_half_of_the_readings_is_told(self, clipped: int, told: bool) -> None:
        """Of 40 readings 20 at the same maximum are not yet most, 21 are; equal means within 1e-3."""
        norms = [1.0 - 1e-6 * number for number in range(clipped)] + [0.5] * (40 - clipped)
        found = ask(d.clipped, [Reading(step, {GLOBAL_L2: norm}) for step, norm in enumerate(norms)])
        assert len(found) == told
        if told:
            assert (found[0].level, found[0].value) == (Level.INFO, 21 / 40)


@pytest.mark.parametrize(
    ("ratio", "level"), [(-1.69, Level.WARN), (-1.71, None), (-3.0, None), (-4.99, None), (-5.01, Level.INFO)]
)
def test_update_ratios_outside_the_band_are_told(ratio: float, level: Level | None) -> None:
    """Fifty readings in a row above -1.7 are WARN, below -5 INFO, inside nothing; 49 are not enough."""
    values = [{("updates", "log10_ratio", "fc.weight"): ratio, ("updates", "log10_ratio", "ok"): -3.0}] * 50
    found = ask(d.update_ratio, series(values))
    assert [finding.level for finding in found] == ([level] if level is not None else [])
    assert all(finding.site == Site("updates", "fc.weight") and finding.step == 490 for finding in found)
    assert ask(d.update_ratio, series(values[1:])) == []
    interrupted = [*values[:20], {("updates", "log10_ratio", "fc.weight"): -3.0}, *values[21:]]
    assert ask(d.update_ratio, series(interrupted)) == []


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_update_ratios_are_judged_by_the_last_readings_that_have_them(data: st.DataObject) -> None:
    """Whichever matrices have a ratio on a reading: those whose last five are all outside are told, and no other."""
    config = Config(update_ratio_checks=5)
    ratio = st.sampled_from([-1.0, -1.0, -1.0, -9.0, -9.0, -3.0])
    row = st.dictionaries(st.sampled_from("abc"), ratio)
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    found = d.update_ratio(series([{("updates", "log10_ratio", k): v for k, v in r.items()} for r in rows]), config)
    expected = []
    for name, now in rows[-1].items():
        recent = [r[name] for r in reversed(rows) if name in r][:5]
        if len(recent) == 5 and (min(recent) > config.update_ratio_high or max(recent) < config.update_ratio_low):
            expected.append((name, now))
    assert [(finding.site and finding.site.name, finding.value) for finding in found] == expected


class TestUnits:
    """Dead and saturated layers."""

    @pytest.mark.parametrize(
        ("dead", "windows", "level"),
        [(9, 1, None), (10, 1, Level.WARN), (60, 1, Level.WARN), (49, 2, Level.WARN), (50, 2, Level.CRIT)],
    )
    def test_dead_layers(self, dead: int, windows: int, level: Level | None) -> None:
        """A tenth of the units is WARN, half of them CRIT after two windows, less is nothing."""
        found = status("act", units=100, dead=tuple(range(dead)), windows=windows, verdict="dead")
        findings = ask(d.dead_units, [Reading(7, {}, {"ok": status("ok"), "act": found})])
        assert [finding.level for finding in findings] == ([level] if level is not None else [])
        assert all(finding.site == Site("activations", "act") and finding.step == 7 for finding in findings)

    @pytest.mark.parametrize("verdict", ["no-data", "watching"])
    def test_nothing_is_said_before_the_window_is_full(self, verdict: str) -> None:
        """Units of which there is not enough evidence are not called dead or saturated."""
        units = {"act": status("act", function="tanh", dead=(0, 1), saturated=(0.9,) * 10, verdict=verdict)}
        later = {("activations", "rms", "act"): 1.0, ("activations", "rms", "head"): 1.0}
        assert ask(d.dead_units, [reading(0, later, units=units)]) == []
        assert ask(d.saturated_units, [reading(0, later, units=units)]) == []

    @pytest.mark.parametrize(
        ("share", "windows", "level"),
        [(0.2, 9, None), (0.21, 9, Level.WARN), (0.51, 1, Level.WARN), (0.51, 2, Level.CRIT)],
    )
    def test_saturated_layers(self, share: float, windows: int, level: Level | None) -> None:
        """More than a fifth is WARN, more than half CRIT after two windows."""
        units = {"act": status("act", function="tanh", saturated=(share,) * 10, saturated_windows=windows)}
        values = {("activations", "rms", "act"): 1.0, ("activations", "rms", "head"): 1.0}
        findings = ask(d.saturated_units, [reading(3, values, units=units)])
        assert [finding.level for finding in findings] == ([level] if level is not None else [])

    def test_a_relu_and_the_last_module_are_exempt(self) -> None:
        """A ReLU that is off on most samples works; the sigmoid at the output of a network is sure."""
        units = {
            "0": status("0", function="relu", saturated=(0.9,) * 10),
            "1": status("1", function="sigmoid", saturated=(0.9,) * 10),
        }
        values = {("activations", "rms", name): 1.0 for name in ("0", "1", "Sequential")}
        assert ask(d.saturated_units, [reading(0, values, units=units)]) == []
        further = {("activations", "rms", name): 1.0 for name in ("0", "1", "2", "Sequential")}
        assert [f.site for f in ask(d.saturated_units, [reading(0, further, units=units)])] == [
            Site("activations", "1")
        ]


def _through_depth(kind: str, sizes: list[float], name: str = "blocks.{}.fc.weight") -> list[Reading]:
    values = {(kind, "rms", name.format(number)): size for number, size in enumerate(sizes)}
    names = {key[2]: MATRIX for key in values}
    return series([values] * 5, parameters=names)


class TestDepth:
    """Scale through depth."""

    @pytest.mark.parametrize(
        ("sizes", "diagnostic", "level", "layer"),
        [
            ([1e-4, 1e-3, 1.001e-2], "vanishing_gradient", Level.WARN, 0),
            ([0.9e-7, 1e-5, 1e-2], "vanishing_gradient", Level.CRIT, 0),
            ([1.001e-2, 1e-3, 1e-4], "exploding_gradient", Level.WARN, 0),
            ([1e-4, 1e-3, 0.999e-2], None, None, 0),
            ([1e-4, 1.0, 1e-4, 1.0], None, None, 0),
            ([1e-4, 1.0], None, None, 0),
            ([0.0, 1e-4, 1.0], None, None, 0),
        ],
    )
    def test_gradients(self, sizes: list[float], diagnostic: str | None, level: Level | None, layer: int) -> None:
        """A steady rise or fall by more than 100 is told at the first layer; else, or of two layers, nothing."""
        found = ask(d.gradient_scale, _through_depth("gradients", sizes))
        assert [(f.diagnostic, f.level) for f in found] == ([(diagnostic, level)] if diagnostic else [])
        assert all(f.site == Site("gradients", f"blocks.{layer}.fc.weight") for f in found)

    def test_vectors_and_layers_of_another_role_are_not_compared(self) -> None:
        """Gradients of biases, and of layers whose names differ in more than numbers, say nothing."""
        readings = _through_depth("gradients", [1e-9, 1e-5, 1.0])
        vectors = {name: ParameterTraits(1, True) for name in readings[0].parameters}
        assert ask(d.gradient_scale, [Reading(r.step, r.values, parameters=vectors) for r in readings]) == []
        values = {("gradients", "rms", name): size for name, size in (("a.w", 1e-9), ("b.w", 1e-5), ("c.w", 1.0))}
        assert ask(d.gradient_scale, series([values] * 5)) == []

    def test_gradients_of_activations_stand_in_where_no_others_are_watched(self) -> None:
        """Without gradients of parameters those of activations are compared."""
        (found,) = ask(d.gradient_scale, _through_depth("activation_gradients", [1e-6, 1e-4, 1e-2], "{}"))
        assert found.site == Site("activation_gradients", "0")

    @pytest.mark.parametrize(("last", "told"), [(999.0, False), (1001.0, True)])
    def test_activations(self, last: float, told: bool) -> None:
        """A steady growth by more than 1000 is told, by less not; five readings are needed."""
        readings = _through_depth("activations", [1.0, 30.0, last], "blocks.{}")
        found = ask(d.activation_scale, readings)
        assert [f.site for f in found] == ([Site("activations", "blocks.2")] if told else [])
        assert ask(d.activation_scale, readings[1:]) == []


def _of_parameter(gradient: float | None, update: float | None = None) -> dict[Any, float]:
    values = {("gradients", "abs_max", "other"): 1.0, tuple(GLOBAL_L2): 1.0, ("parameters", "rms", "fc.weight"): 1.0}
    if gradient is not None:
        values["gradients", "abs_max", "fc.weight"] = gradient
    if update is not None:
        values["updates", "abs_max", "fc.weight"] = update
    return values


class TestParameters:
    """Parameters that take no part."""

    @pytest.mark.parametrize(
        ("gradient", "words"), [(None, "has never had a gradient"), (0.0, "a gradient of nothing but zeros")]
    )
    def test_no_gradient_on_ten_readings(self, gradient: float | None, words: str) -> None:
        """Ten readings without a gradient, or with one of zeros, are told; nine, or one in between, are not."""
        traits = {"fc.weight": MATRIX, "other": MATRIX}
        values = [_of_parameter(gradient)] * 10
        (found,) = ask(d.no_gradient, series(values, parameters=traits))
        assert (found.level, found.site, found.step) == (Level.WARN, Site("gradients", "fc.weight"), 90)
        assert words in found.sentence
        assert ask(d.no_gradient, series(values[1:], parameters=traits)) == []
        assert ask(d.no_gradient, series([*values[:5], _of_parameter(1e-9), *values[6:]], parameters=traits)) == []

    def test_frozen_parameters_are_info_and_not_accused(self) -> None:
        """A parameter with requires_grad False is named as frozen, and not as one that lacks a gradient."""
        traits = {"fc.weight": ParameterTraits(2, False), "other": MATRIX}
        readings = series([_of_parameter(None)] * 10, parameters=traits)
        assert ask(d.no_gradient, readings) == []
        (found,) = ask(d.frozen, readings)
        assert (found.level, found.site) == (Level.INFO, Site("parameters", "fc.weight"))

    def test_a_gradient_and_no_change_on_three_readings(self) -> None:
        """Updates of exactly zero under a gradient are told after three readings, not where a step was skipped."""
        values = [_of_parameter(1.0, update=0.0)] * 3
        (found,) = ask(d.unchanged, series(values))
        assert (found.level, found.site, found.step) == (Level.WARN, Site("updates", "fc.weight"), 20)
        assert ask(d.unchanged, series(values[1:])) == []
        assert ask(d.unchanged, series([_of_parameter(1.0, update=1e-30), *values[1:]])) == []
        skipped = {**values[0], tuple(SKIPPED): 1.0}
        assert ask(d.unchanged, series([skipped, *values[1:]])) == []
        assert ask(d.unchanged, series([_of_parameter(0.0, update=0.0)] * 3)) == []

    def test_gradients_of_rounding_errors_change_nothing_and_are_no_fault(self) -> None:
        """Where the largest gradient is 1, one of 1.1e-4 must change something, one of 0.9e-4 need not."""
        for gradient, told in ((1.1e-4, True), (0.9e-4, False)):
            assert bool(ask(d.unchanged, series([_of_parameter(gradient, update=0.0)] * 3))) == told


class TestPrecision:
    """Narrow formats."""

    @pytest.mark.parametrize(("share", "told"), [(0.5, False), (0.51, True)])
    def test_underflow_on_three_readings(self, share: float, told: bool) -> None:
        """More than half of a gradient below the normal numbers is told after three readings."""
        values = [{("activation_gradients", "subnormal_fraction", "fc"): share}] * 3
        found = ask(d.underflow, series(values))
        assert [f.site for f in found] == ([Site("activation_gradients", "fc")] if told else [])
        assert ask(d.underflow, series(values[1:])) == []

    @pytest.mark.parametrize(("share", "told"), [(0.5, False), (0.51, True)])
    def test_near_overflow(self, share: float, told: bool) -> None:
        """An activation beyond half of the range is told; a gradient is not, scalers drive it there."""
        found = ask(d.near_overflow, series([{("activations", "range_fraction", "fc"): share}]))
        assert [f.level for f in found] == ([Level.WARN] if told else [])
        assert ask(d.near_overflow, series([{("gradients", "range_fraction", "fc"): share}])) == []


@pytest.mark.parametrize(("most", "told"), [(99.0, False), (101.0, True)])
def test_outliers(most: float, told: bool) -> None:
    """A value above 100 that is more than 100 times the root mean square is told as INFO."""
    found = ask(d.outliers, series([{("activations", "abs_max", "a"): most, ("activations", "rms", "a"): 0.5}]))
    assert [f.level for f in found] == ([Level.INFO] if told else [])
    assert ask(d.outliers, series([{("activations", "abs_max", "a"): most, ("activations", "rms", "a"): 2.0}])) == []


def test_the_registry_lists_every_diagnostic_once() -> None:
    """Every public function of the package that takes readings is in the list, and each has thresholds or none."""
    public = {name for name in d.__all__ if name not in ("DIAGNOSTICS", "Diagnostic")}
    assert [diagnostic.__name__ for diagnostic in d.DIAGNOSTICS] != []
    assert {diagnostic.__name__ for diagnostic in d.DIAGNOSTICS} == public
    assert len(d.DIAGNOSTICS) == len(public)


@pytest.mark.parametrize("diagnostic", d.DIAGNOSTICS, ids=lambda diagnostic: diagnostic.__name__)
def test_nothing_is_said_of_nothing(diagnostic: d.Diagnostic) -> None:
    """No diagnostic has anything to say of an empty reading, nor of a hundred of them."""
    assert ask(diagnostic, series([{}])) == []
    assert ask(diagnostic, series([{}] * 100)) == []
