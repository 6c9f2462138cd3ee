"""The doctor: what is told once, what again, and what becomes of a diagnostic that raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument import measure
from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose import diagnostics
from instrument.diagnose.doctor import Doctor
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import GLOBAL_L2, ParameterTraits, Reading
from instrument.errors import InstrumentWarning
from instrument.record.buffer import StepRecord, Traits
from instrument.record.tags import Tag

SITE = Site("activations", "fc")


def level_of(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """Finds what the reading says, by its loss: 0 for nothing, else the level."""
    newest = readings[-1]
    if newest.loss:
        yield Finding(Level(int(newest.loss)), "level_of", SITE, newest.step, newest.loss, 0.0, "loss", "so it is")


def raises(readings: Sequence[Reading], config: Config) -> list[Finding]:
    """A diagnostic with a fault."""
    raise ZeroDivisionError("a fault")


def seen(doctor: Doctor, levels: Sequence[tuple[int, float]]) -> list[tuple[int, str]]:
    """Step and level of what is told of readings of these steps and levels."""
    for step, level in levels:
        doctor.examine(Reading(step, {}, loss=level))
    return [(finding.step, str(finding.level)) for finding in doctor.findings()]


def test_what_stays_is_told_once_and_again_only_when_it_gets_worse() -> None:
    """A finding that persists is told once, and once more when its level rises; falling back tells nothing."""
    doctor = Doctor(Config(), None, diagnostics=[level_of])
    levels = [(0, 0.0), (10, 20.0), (20, 20.0), (5000, 20.0), (5010, 30.0), (5020, 20.0), (5030, 30.0)]
    # From step 20 to 5000 no reading was made, so nobody knows whether it stayed.
    assert seen(doctor, levels) == [(10, "WARN"), (5000, "WARN"), (5010, "CRIT")]


@pytest.mark.parametrize(("gap", "told"), [(100, 1), (101, 2)])
def test_what_was_gone_for_longer_than_the_cooldown_is_told_again(gap: int, told: int) -> None:
    """Back after exactly the cooldown, nothing is told; after one step more it is."""
    doctor = Doctor(Config(finding_cooldown=100), None, diagnostics=[level_of])
    assert len(seen(doctor, [(0, 20.0), (1, 0.0), (gap, 20.0)])) == told


def test_what_the_newest_reading_suffers_from_is_active() -> None:
    """A finding is active while it is found, whether told again or not, and no longer."""
    doctor = Doctor(Config(), None, diagnostics=[level_of])
    seen(doctor, [(0, 20.0), (1, 20.0)])
    assert [finding.step for finding in doctor.active()] == [1]
    seen(doctor, [(2, 0.0)])
    assert doctor.active() == ()


def test_a_diagnostic_that_raises_is_switched_off_with_one_warning() -> None:
    """Its fault is warned of once, it is never asked again, and the others go on."""
    doctor = Doctor(Config(), None, diagnostics=[raises, level_of])
    with pytest.warns(InstrumentWarning, match="the diagnostic raises raised ZeroDivisionError: a fault") as caught:
        assert seen(doctor, [(0, 20.0), (1, 30.0)]) == [(0, "WARN"), (1, "CRIT")]
    assert len(caught) == 1


def test_in_strict_mode_a_diagnostic_that_raises_does_so_for_who_asks() -> None:
    """In strict mode asking for findings raises the fault, once."""
    doctor = Doctor(Config(), None, diagnostics=[raises], strict=True)
    with pytest.warns(InstrumentWarning):
        doctor.examine(Reading(0, {}))
    with pytest.raises(ZeroDivisionError, match="a fault"):
        doctor.findings()
    assert doctor.findings() == ()


def test_a_run_that_was_resumed_forgets_what_came_after() -> None:
    """Readings and findings from the step on at which a run was resumed are void."""
    doctor = Doctor(Config(), None, diagnostics=[level_of])
    assert seen(doctor, [(0, 0.0), (10, 20.0), (20, 20.0)]) == [(10, "WARN")]
    assert seen(doctor, [(5, 0.0)]) == []
    assert [reading.step for reading in doctor.readings] == [0, 5]


def test_what_was_void_is_told_when_it_happens_again() -> None:
    """A finding that became void by a resumption is told when the resumed run has it too."""
    doctor = Doctor(Config(), None, diagnostics=[level_of])
    seen(doctor, [(0, 0.0), (10, 20.0)])
    assert seen(doctor, [(5, 0.0), (10, 20.0)]) == [(10, "WARN")]


def test_a_second_optimizer_joins_the_reading_of_its_step() -> None:
    """Two records of one step are one reading, with the norm of all gradients of both."""
    doctor = Doctor(Config(), None)
    for name in ("a", "b"):
        doctor.add(StepRecord(3, {f"Gradients/{name}": measure(torch.tensor([3.0 if name == "a" else 4.0]))}, 0.0))
    assert len(doctor.catch_up()) == 2
    (reading,) = doctor.readings
    assert reading.values[GLOBAL_L2] == 5.0
    assert [site.name for site in reading.sites] == ["a", "b"]


class TestReadings:
    """What a reading has beside scalars."""

    @staticmethod
    def reading(tensors: dict[str, torch.Tensor], scale: float = 1.0) -> Reading:
        sketches = {tag: measure(tensor / scale if scale != 1.0 else tensor) for tag, tensor in tensors.items()}
        traits = {tag: Traits(t.dtype, t.dim(), True, scale) for tag, t in tensors.items()}
        return Reading.of_record(StepRecord(0, sketches, 0.0, traits=traits))

    def test_the_ratio_is_that_of_matrices(self) -> None:
        """log10 of update over weight is there for a matrix, and not for a vector or an update of zeros."""
        tensors = {}
        for name, size, change in (
            ("w", torch.full((2, 2), 2.0), 0.02),
            ("b", torch.ones(2), 0.1),
            ("z", torch.ones(2, 2), 0.0),
        ):
            tensors[f"Updates/{name}"] = torch.full((4,), change)
            tensors[f"Parameters/{name}"] = size
        reading = self.reading(tensors)
        assert reading.column("updates", "log10_ratio") == {"w": pytest.approx(-2.0)}
        assert reading.parameters["b"] == ParameterTraits(1, True)

    def test_the_subnormal_share_of_float16(self) -> None:
        """Of four non-zero values three below 2**-14 are three quarters; in float32 nobody asks."""
        values = [0.0, 2.0**-20, 2.0**-18, 2.0**-16, 1.0]
        for dtype, expected in ((torch.float16, 0.75), (torch.float32, None), (torch.bfloat16, None)):
            reading = self.reading({"Gradients/w": torch.tensor(values, dtype=dtype)})
            assert reading.get("gradients", "subnormal_fraction", "w") == expected

    def test_the_subnormal_share_is_that_of_the_scaled_tensor(self) -> None:
        """Gradients that a scaler had multiplied by 1024 were that much larger where they were in float16."""
        tensor = torch.tensor([2.0**-16, 2.0**-16, 2.0**-5, 1.0], dtype=torch.float16)
        reading = Reading.of_record(
            StepRecord(
                0,
                {"ActivationGradients/a": measure(tensor).divided(1024.0)},
                0.0,
                traits={"ActivationGradients/a": Traits(torch.float16, 1, False, 1024.0)},
            )
        )
        assert reading.get("activation_gradients", "subnormal_fraction", "a") == 0.5
        assert reading.get("activation_gradients", "range_fraction", "a") == pytest.approx(1 / 65504)

    def test_the_order_is_that_of_execution(self) -> None:
        """Sites come in the order of the record, those without a finite value too."""
        nan = torch.tensor([float("nan")])
        reading = self.reading({"Activations/b": nan, "Activations/a": torch.ones(1), "Gradients/b": nan})
        assert reading.sites == (Site("activations", "b"), Site("activations", "a"), Site("gradients", "b"))
        assert reading.values[Tag("activations", "nan_count", "b")] == 1.0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_findings_that_stand_are_those_that_are_found_anew_each_step(data: st.DataObject) -> None:
    """Told once, again when worse or back after the cooldown, and active with the newest step, whatever else comes."""

    def no_gradient(readings: Sequence[Reading], config: Config) -> list[Finding]:
        return list(diagnostics.no_gradient(readings, config))

    config = Config(unused_checks=3, finding_cooldown=20)
    anew, standing = (Doctor(config, None, diagnostics=[each]) for each in (no_gradient, diagnostics.no_gradient))
    traits = {name: ParameterTraits(2, True) for name in ("a", "b", "c", "d")}
    step, silent = 0, {"a", "b"}
    for _ in range(data.draw(st.integers(1, 40))):
        step += data.draw(st.sampled_from([1, 1, 1, 1, 1, 30]))
        if data.draw(st.integers(0, 30)) == 0:
            step = max(0, step - 10)  # the run was resumed
        if data.draw(st.integers(0, 4)) == 0:
            silent ^= {data.draw(st.sampled_from("abcd"))}
        values = {Tag("gradients", "abs_max", name): float(name not in silent) for name in "abc"}
        values[GLOBAL_L2] = 1.0
        reading = Reading(step, values, parameters=traits)
        assert standing.examine(reading) == anew.examine(reading)
        assert sorted(map(str, standing.active())) == sorted(map(str, anew.active()))
    assert standing.findings() == anew.findings()
