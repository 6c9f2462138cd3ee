"""Tallies that are worked out when small tensors are measured together are those that are made at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from instrument.measure.batch import Batch, Column, measure_later
from instrument.measure.groups import ArrivingGroup
from instrument.measure.slopes import slopes_named
from instrument.measure.small import GROUP
from instrument.measure.units import LateTallies, UnitTally, late, tally_rows, tally_units
from instrument.torch_private import Unseen

from .interruption import interrupted_at

pytestmark = pytest.mark.usefixtures("engine")

SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((7, 5), 1), ((1, 300), 1), ((130, 16), 1), ((4, 10, 6), 2), ((6, 5, 4, 3), 1), ((2, 3, 40, 30), 1), ((9,), 0)
]  # fmt: skip
FUNCTIONS = [None, "relu", "tanh"]


def assert_same(found: UnitTally, expected: object) -> None:
    assert isinstance(expected, UnitTally)
    for field in dataclasses.fields(UnitTally):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, field.name)
        elif field.name == "square_mean":
            assert one == pytest.approx(other, rel=1e-12, nan_ok=True)
        else:
            assert one == other, field.name


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, some units of which are shifted far to either side, and one NaN in every third tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator)
    if seed % 3 == 0:
        found.view(-1)[-1] = float("nan")
    found[..., ::2] += 5.0 * (seed % 2) - 2.5
    return found.to(dtype)


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("deliberate")


def a_tally_that_waits() -> tuple[ArrivingGroup, int, int]:
    """A group with one tensor of ones, its place there, and the number of the tally of its units."""
    group, place = Batch().put(torch.ones(3, 2))
    assert isinstance(group, ArrivingGroup)
    number = group.tally(place, (3, 2), 1, None)
    assert number is not None
    return group, place, number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_units_are_tallied_as_at_once(dtype: torch.dtype) -> None:
    """Of tensors of every shape, with a nonlinearity and without, in a row and not, changed after they were added."""
    batch = Batch()
    waiting, expected = [], []
    for seed in range(3):
        for shape, axis in SHAPES:
            for function in FUNCTIONS:
                tensor = values(shape, seed, dtype)
                if seed == 2 and tensor.dim() == 2:
                    tensor = values(shape[::-1], seed, dtype).t()
                slopes = slopes_named(function) if function else None
                with Unseen():
                    expected.append(tally_units(tensor, axis, slopes))
                group, place = batch.put(tensor)
                assert isinstance(group, ArrivingGroup)
                number = group.tally(place, tuple(tensor.shape), axis, slopes)
                assert number is not None
                waiting.append((group, number))
                tensor.zero_()
    for (group, number), other in zip(waiting, expected, strict=True):
        assert_same(group.made(number), other)
        assert isinstance(other, UnitTally)
        assert group.samples_of(number) == other.samples == group.late(number).samples
        assert_same(group.late(number).fetch(), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", [(), (0,), (2, 3), (0, 1, 2, 3, 4)])
def test_rows_of_gradients_are_tallied_as_at_once(zeros: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of gradients without a row of zeros, with some, of zeros alone: a negative zero is one, a NaN is none."""
    gradients = [values((5, 8), seed, dtype) for seed in range(4)] + [torch.ones(5, 2, 2, 3, dtype=dtype)]
    for gradient in gradients:
        for row in zeros:
            gradient[row] = -0.0 if row % 2 else 0.0
    column, waiting = Column(), []

    def handed_over() -> Iterator[torch.Tensor]:
        for gradient in gradients:
            yield gradient
            item = column.items[-1]
            assert isinstance(item, int)
            group = column.groups[item // GROUP]
            found = group.rows([item % GROUP], [len(gradient)], [64])
            assert found is not None
            waiting.append((group, found))

    measure_later(handed_over(), column=column)
    (together,) = column.groups
    first = together.rows(range(len(gradients)), [len(gradient) for gradient in gradients], [64] * len(gradients))
    assert first == len(waiting)
    waiting += [(together, first + number) for number in range(len(gradients))]
    with Unseen():
        expected = [tally_rows(gradient, 0, 64) for gradient in gradients] * 2
    for gradient in gradients:
        gradient.fill_(1.0)
    for (group, number), other in zip(waiting, expected, strict=True):
        assert_same(group.made(number), other)
    if not zeros:
        assert waiting[0][0].made(waiting[0][1]) is waiting[1][0].made(waiting[1][1])


def test_what_is_measured_already_is_tallied_at_once_by_whoever_asks() -> None:
    """Once the values are gone, a group takes no more wishes."""
    batch = Batch()
    group, place = batch.put(torch.ones(3, 2))
    assert isinstance(group, ArrivingGroup)
    group.sketches()
    assert group.tally(place, (3, 2), 1, None) is None
    assert group.rows([place], [3], [1]) is None


def test_a_tally_that_fails_leaves_the_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in one is told to those who ask for tallies, and the sketches of the group are there."""
    group, place, _ = a_tally_that_waits()
    other = group.tally(place, (3, 2), 1, slopes_named("relu"))
    assert other is not None
    monkeypatch.setattr(late, "tally_plain", broken)
    monkeypatch.setattr(late, "tally_of_range", lambda extent: UnitTally.empty(2))
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        group.made(other)
    assert group.sketches()[place].mean == 1.0


def test_a_group_that_fails_says_so_to_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault before anything is made is raised for tallies and for sketches alike."""
    group, _, number = a_tally_that_waits()
    monkeypatch.setattr(LateTallies, "make", broken)
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        group.made(number)
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        group.sketches()


def test_a_tensor_that_has_grown_since_is_not_read_beyond_its_copy() -> None:
    """New data under an old identity, of another size, are tallied at once or not at all."""
    group, place = Batch().put(torch.ones(3, 2))
    assert isinstance(group, ArrivingGroup)
    assert group.tally(place, (300, 200), 1, None) is None
    assert group.tally(place, (2, 3), 1, None) is not None


@pytest.mark.parametrize("are_rows", [False, True])
def test_a_wish_that_is_interrupted_changes_no_other(are_rows: bool) -> None:
    """Wherever Ctrl-C comes while a tally is asked for, those asked for before and after are of their own tensors."""
    shape = (3, 2)
    for place in itertools.count():
        group = ArrivingGroup(torch.float32)

        def ask(number: int, group: ArrivingGroup = group) -> int | None:
            at = group.add(tensor := torch.full(shape, float(number)), 6, tensor.data_ptr())
            assert at is not None
            return group.rows([at], [3], [1 + number]) if are_rows else group.tally(at, shape, 1, None)

        numbers = [ask(0)]
        try:
            interrupted_at(place, [LateTallies.add, LateTallies.add_rows], functools.partial(ask, 1))
        except StopIteration:
            break
        numbers += [ask(2), ask(3)]
        made = [group.made(number) for number in numbers if number is not None]
        assert [tally.samples for tally in made] == ([0, 3, 4] if are_rows else [3, 3, 3])
        if not are_rows:
            assert [tally.low.tolist() for tally in made] == [[0.0] * 2, [2.0] * 2, [3.0] * 2]
    assert place > 10
