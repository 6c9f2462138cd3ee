"""Many small tensors measured together, against each measured by itself and against float64 NumPy."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from instrument.errors import UnmeasurableError
from instrument.measure import groups
from instrument.measure.batch import Batch, Column, measure_later, measure_many
from instrument.measure.custom_op import measure
from instrument.measure.groups import Later
from instrument.measure.pending import gathered
from instrument.measure.sketch import Sketch
from instrument.measure.small import GROUP, SMALL, TOGETHER

from .interruption import interrupted_at
from .twin import assert_measures

pytestmark = pytest.mark.usefixtures("engine")

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
ORDINARY = st.floats(-100.0, 100.0, width=32)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def assert_same(found: object, alone: Sketch) -> None:
    """Counts and extremes are equal to the last bit; sums differ by roundings at most."""
    assert isinstance(found, Sketch)
    assert found.codes.dtype == alone.codes.dtype
    assert found.codes.tolist() == alone.codes.tolist()
    assert found.counts.tolist() == alone.counts.tolist()
    for name in ("low", "high", "count", "zero_count", "nan_count", "inf_count"):
        assert repr(getattr(found, name)) == repr(getattr(alone, name)) or getattr(alone, name) == 0.0
    assert found.total == pytest.approx(alone.total, rel=1e-15, abs=1e-15 * alone.l2)
    assert found.total_squares == pytest.approx(alone.total_squares, rel=1e-14)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(st.one_of(FLOATS, ORDINARY), max_size=20), TYPES), max_size=30))
def test_together_is_one_by_one(parts: list[tuple[list[float], torch.dtype]]) -> None:
    """Any mixture of small tensors, empty ones, NaN, Inf and subnormals among them, measures as each by itself."""
    tensors = [torch.tensor(values, dtype=torch.float64).to(dtype) for values, dtype in parts]
    for tensor, found in zip(tensors, measure_many(tensors), strict=True):
        assert_same(found, measure(tensor))
        assert isinstance(found, Sketch)
        assert_measures(found, tensor.double().numpy())


def test_many_groups_follow_each_other() -> None:
    """More tensors, and more elements, than one group takes come back in their order, each as NumPy says."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 400, (2 * GROUP + 7,), generator=generator).tolist()
    tensors = [torch.randn(size, generator=generator) * 10.0 ** (index % 9 - 4) for index, size in enumerate(sizes)]
    tensors[3] = torch.relu(tensors[3])
    tensors[5][0] = math.nan
    for tensor, found in zip(tensors, measure_many(tensors), strict=True):
        assert isinstance(found, Sketch)
        assert_measures(found, tensor.numpy())


def test_codes_that_never_occurred_before_are_counted() -> None:
    """What earlier batches were made of does not matter: other magnitudes come, in turn, and all are counted."""
    for exponent in (-30, 0, 20, -8, 0, 30):
        values = torch.randn(300, generator=torch.Generator().manual_seed(exponent + 30)) * 10.0**exponent
        (found,) = measure_many([values])
        assert_same(found, measure(values))
    bits = torch.arange(0, 1 << 32, 1 << 20).to(torch.int64).to(torch.uint32).view(torch.float32)  # all codes
    (found,) = measure_many([bits])
    assert_same(found, measure(bits))


@pytest.mark.parametrize("size", [1, SMALL, SMALL + 1, 300_000])
def test_sizes_around_the_limit(size: int) -> None:
    """Tensors at and above the limit, measured by themselves, stand beside small ones in the order given."""
    tensors = [torch.ones(2), torch.randn(size, generator=torch.Generator().manual_seed(size)), torch.zeros(3)]
    for tensor, found in zip(tensors, measure_many(tensors), strict=True):
        assert_same(found, measure(tensor))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_any_kind_of_tensor_may_stand_among_the_small_ones() -> None:
    """Strided, expanded, negated, integer, complex and sparse tensors measure as by themselves; others say why not."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    freed = torch.ones(5)
    freed.untyped_storage().resize_(0)
    tensors = [
        base.mT,
        base[::2, 1::3],
        base[:, :1].expand(-1, 5),
        torch.view_as_complex(base.view(6, 4, 2)).conj().imag,
        torch.nn.Parameter(base),
        base.to(torch.int8),
        torch.view_as_complex(base.view(6, 4, 2)),
        base.to_sparse(),
        base.to("meta"),
        torch.nested.nested_tensor([base[0], base[1, :3]]),
        freed,
        base[0, 0],
        base,
    ]
    for tensor, found in zip(tensors, measure_many(tensors), strict=True):
        if isinstance(found, Exception):
            with pytest.raises(UnmeasurableError, match=str(found).replace("(", r"\(").replace(")", r"\)")):
                measure(tensor)
        else:
            assert_same(found, measure(tensor))
    assert sum(isinstance(found, UnmeasurableError) for found in measure_many(tensors)) == 3


def sketch_of(item: object) -> Sketch:
    """The sketch that was made, or that waits."""
    found = item if isinstance(item, Sketch) else item.sketch()  # type: ignore[attr-defined]
    assert isinstance(found, Sketch)
    return found


def test_a_long_list_fills_several_groups() -> None:
    """More tensors, and more elements, than a group takes, with a large one in between, are copied, and all there."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 1200, (2 * GROUP + 7,), generator=generator).tolist()
    sizes[5] = 3 * SMALL
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    column = measure_later(tensors)
    expected = [measure(tensor) for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(len(group) <= GROUP and group.size <= TOGETHER for group in column.groups)
    assert min(map(len, column.groups[:-1])) < GROUP  # its elements filled that group
    assert len(column.items) == len(tensors)
    for found, alone in zip(column, expected, strict=True):
        assert_same(sketch_of(found), alone)
    together = measure_later([torch.full((3,), float(number)) for number in range(2 * GROUP + 7)]).sketches()
    assert together.column("low").tolist() == list(range(2 * GROUP + 7))


def freed() -> torch.Tensor:
    """A tensor whose storage was given back, as FSDP does."""
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "odd",
    [
        freed,
        lambda: torch.empty(0),
        lambda: torch.arange(SMALL + 1.0),
        lambda: torch.arange(8.0)[4:],
        lambda: torch.arange(8.0).view(2, 4).t(),
        lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        lambda: torch.ones(3, dtype=torch.float64),
        lambda: torch.ones(3, dtype=torch.int32),
        lambda: torch.ones(3, dtype=torch.bfloat16),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nn.Parameter(torch.ones(2, 2)),
    ],
)
@pytest.mark.parametrize("places", [(0,), (2,), (1, 3)])
def test_a_list_is_measured_as_one_by_one(odd: Callable[[], torch.Tensor], places: tuple[int, ...]) -> None:
    """Of tensors that are there at the same time, whatever stands among them, each is what it is by itself."""
    tensors = [odd() if place in places else torch.full((place + 1,), float(place)) for place in range(5)]
    together, alone = measure_later(tensors), measure_later(iter(tensors))
    for found, expected in zip(together, alone, strict=True):
        if isinstance(expected, Exception):
            assert (type(found), str(found)) == (type(expected), str(expected))
        else:
            assert_same(sketch_of(found), sketch_of(expected))


def test_a_batch_measures_the_values_that_were_there_when_they_were_added() -> None:
    """A tensor that is changed or freed after it was added is measured as it was then."""
    batch = Batch()
    tensor = torch.full((4,), 2.0)
    before = batch.add(tensor)
    tensor.mul_(3)
    after = batch.add(tensor)
    tensor.untyped_storage().resize_(0)
    assert isinstance(before, Later)
    assert isinstance(after, Later)
    assert (before.sketch().mean, after.sketch().mean) == (2.0, 6.0)
    again = batch.add(torch.zeros(1))
    assert isinstance(again, Later)
    assert again.sketch().zero_count == 1


@pytest.mark.parametrize("count", [1, 2, 3 * GROUP])
def test_what_is_measured_later_has_the_values_of_now(count: int) -> None:
    """Tensors that change after they were handed over, one alone among them, are measured as they were."""
    tensors = [torch.full((2,), float(index)) for index in range(count)]
    found = measure_later(tensors)
    for tensor in tensors:
        tensor.fill_(-1.0)
    assert [item.sketch().mean for item in found if isinstance(item, Later)] == [float(i) for i in range(count)]


def test_a_batch_gives_every_tensor_its_own_sketch_across_groups() -> None:
    """More tensors than a group takes come back each with its own values, whichever is asked for first."""
    batch, count = Batch(), 3 * GROUP + 5
    added = [batch.add(torch.full((2,), float(index))) for index in range(count)]
    means = [item.sketch().mean for item in reversed(added) if isinstance(item, Later)]
    assert means == [float(index) for index in reversed(range(count))]


class Seeing(TorchDispatchMode):
    """Sees every operation that is not hidden."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_grows_with_what_comes(dtype: torch.dtype) -> None:
    """Tensors that fill several blocks and groups, on the first step and once their number is known, come back whole.

    Some do not lie in a row. A mode of the user's sees none of the memory that is taken for them.
    """
    generator = torch.Generator().manual_seed(0)
    batch = Batch()
    for count in (300, 300, 20, 60, 60):
        sizes = torch.randint(SMALL // 2, SMALL + 1, (count,), generator=generator).tolist()
        tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        tensors[::7] = [torch.stack([tensor, tensor])[:, : SMALL // 4].t() for tensor in tensors[::7]]
        expected = [measure(tensor) for tensor in tensors]
        with Seeing() as mode:
            found = [batch.add(tensor) for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        batch.cut()
        assert mode.seen == []
        every = {id(item.group): item.group.size for item in found if isinstance(item, Later)}
        assert sum(every.values()) == sum(tensor.numel() for tensor in tensors)
        assert max(every.values()) <= TOGETHER
        assert len(every) == (1 if count < 300 else 4)
        for item, alone in zip(found, expected, strict=True):
            assert_same(sketch_of(item), alone)


def test_a_cut_parts_what_came_from_what_comes() -> None:
    """After a cut, measuring what came before leaves what is added afterwards to wait."""
    batch = Batch()
    before = batch.add(torch.ones(2))
    batch.cut()
    after = batch.add(torch.zeros(2))
    assert isinstance(before, Later)
    assert isinstance(after, Later)
    assert before.group is not after.group
    assert (before.sketch().mean, after.sketch().mean) == (1.0, 0.0)


def test_a_batch_takes_tensors_from_several_threads() -> None:
    """Threads that add at the same time, while another measures, each get the sketches of their own tensors."""
    batch = Batch()
    wrong: list[float] = []

    def add(number: int) -> None:
        for index in range(2000):
            value = float(number * 10_000 + index)
            item = batch.add(torch.full((3,), value))
            if index % 97 == 0 and isinstance(item, Later) and item.sketch().mean != value:
                wrong.append(value)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_goes_wrong_in_a_group_is_told_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in measuring together is handed to whoever asks for a sketch of the group, and raised nowhere else."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("deliberate")

    item = Batch().add(torch.ones(2))
    monkeypatch.setattr(sys.modules[Later.__module__], "_measured_together", broken)
    found = measure_many([torch.ones(2), torch.ones(9000)])
    assert isinstance(found[0], ZeroDivisionError)
    assert isinstance(found[1], Sketch)
    assert isinstance(item, Later)
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        item.sketch()


def test_what_does_not_lie_in_a_row_is_gathered_all_the_same() -> None:
    """Transposed, strided, expanded and negated tensors among others are measured as by themselves."""
    rows = torch.arange(12.0).view(3, 4)
    tensors = [torch.ones(2), rows.t(), rows[:, ::2], torch.ones(1).expand(5), torch._neg_view(rows), rows]
    for found, tensor in zip(measure_many(tensors), tensors, strict=True):
        assert found == measure(tensor)
    batch = Batch()
    for later, tensor in [(batch.add(tensor), tensor) for tensor in tensors]:
        assert isinstance(later, Later)
        assert later.sketch() == measure(tensor)


def test_who_asks_while_tensors_are_handed_over_gets_them_and_disturbs_nothing() -> None:
    """Sketches asked for half way, as by a finalizer, are those of what came so far, and the others come later."""
    column = Column()
    asked: list[float] = []

    def handed_over() -> Iterator[torch.Tensor]:
        for value in range(6):
            if value == 3:
                asked.append(column.groups[0].sketches()[2].mean)
            yield torch.full((3,), float(value))

    measure_later(handed_over(), column=column)
    assert asked == [2.0]
    assert [sketch.mean for sketch in column.sketches()] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_tensors_that_cannot_all_be_made_are_held_no_longer() -> None:
    """Where the next tensor raises, those before have been copied, and are free to change."""
    column, first = Column(), torch.ones(3)

    def handed_over() -> Iterator[torch.Tensor]:
        yield first
        raise ZeroDivisionError("deliberate")

    with pytest.raises(ZeroDivisionError, match="deliberate"):
        measure_later(handed_over(), column=column)
    first.zero_()
    assert column.sketches()[0].mean == 1.0


def test_who_adds_in_the_middle_of_an_addition_overwrites_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer may measure a tensor of its own while one is copied, and may ask for all that is there."""
    copy, batch = groups._copy, Batch()
    inside: list[Later] = []

    def interrupted(*places: int) -> None:
        monkeypatch.setattr(groups, "_copy", copy)
        item = batch.add(torch.full((4,), 7.0))
        assert isinstance(item, Later)
        inside.append(item)
        copy(*places)

    first = batch.add(torch.full((2,), 1.0))
    monkeypatch.setattr(groups, "_copy", interrupted)
    second = batch.add(torch.full((3,), 2.0))

    def asking(*places: int) -> None:
        monkeypatch.setattr(groups, "_copy", copy)
        assert isinstance(inside[0], Later)
        inside[0].group.sketches()
        copy(*places)

    monkeypatch.setattr(groups, "_copy", asking)
    third = batch.add(torch.full((5,), 3.0))
    found = [item.sketch() for item in (first, second, inside[0], third) if isinstance(item, Later)]
    assert [(sketch.mean, sketch.count) for sketch in found] == [(1.0, 2), (2.0, 3), (7.0, 4), (3.0, 5)]


def test_who_asks_in_the_middle_of_measuring_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer that asks while a group is measured gets the sketches, and whoever asked first gets the same."""
    item = Batch().add(torch.full((2,), 1.0))
    assert isinstance(item, Later)
    together = groups._measured_together
    inside: list[object] = []

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(groups, "_measured_together", together)
        inside.append(item.group.sketches())
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(groups, "_measured_together", interrupted)
    assert item.group.sketches() is inside[0]


@pytest.mark.parametrize("size", [2, SMALL])
def test_whoever_measures_again_finds_every_block(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of measuring takes nothing away, nor does a finalizer that asks there."""
    batch = Batch()
    items = [batch.add(torch.full((size,), float(number))) for number in range(40)]
    together = groups._measured_together

    def stopped(*_: Any) -> Any:
        monkeypatch.setattr(groups, "_measured_together", asking)
        raise KeyboardInterrupt

    def asking(*arguments: Any) -> Any:
        monkeypatch.setattr(groups, "_measured_together", together)
        assert sketch_of(items[39]).mean == 39.0
        return together(*arguments)

    monkeypatch.setattr(groups, "_measured_together", stopped)
    with pytest.raises(KeyboardInterrupt):
        sketch_of(items[0])
    assert [sketch_of(item).mean for item in items] == [float(number) for number in range(40)]


@pytest.mark.parametrize(("size", "before"), [(100, 3), (SMALL, 16)])
def test_an_addition_that_is_interrupted_shifts_no_other(size: int, before: int) -> None:
    """Wherever Ctrl-C comes while a tensor is taken in, with new memory or without, those around it keep their values.

    Before every instruction, which is more often than Python looks for signals.
    """
    functions = groups.ArrivingGroup.add, groups.ArrivingGroup._room, groups.Group._note
    for place in itertools.count():
        batch, tensor = Batch(), torch.full((size,), 777.0)
        items = [batch.add(torch.full((size,), float(number))) for number in range(before)]
        try:
            found = interrupted_at(place, functions, functools.partial(batch.add, tensor))
        except StopIteration:
            break
        assert found is None
        items += [batch.add(torch.full((5 if number % 2 else size,), float(number))) for number in range(before, 30)]
        assert [sketch_of(item).mean for item in items] == [float(number) for number in range(30)]
    assert place > 50


def test_a_batch_takes_as_much_memory_as_the_step_before() -> None:
    """From the second step on, each group has one block, and its values need not be joined."""
    batch = Batch()
    for step in range(3):
        found = {id(group): group for group, _ in (batch.put(torch.ones(SMALL)) for _ in range(100))}
        blocks = [len(group._rooms) for group in found.values() if isinstance(group, groups.ArrivingGroup)]
        assert blocks == ([4, 3] if step == 0 else [1, 1])
        batch.cut()


@given(st.data())
@settings(deadline=None)
def test_columns_are_in_whatever_order_places_are(data: st.DataObject) -> None:
    """Places of several sources, in runs or one by one, full sources among them, against each place by itself."""
    stride = 8
    many = data.draw(st.lists(st.integers(1, stride), min_size=1, max_size=4))
    sources = []
    for number, count in enumerate(many):
        column = Column()
        column.items += [measure(torch.full((place + 1,), 100.0 * number + place)) for place in range(count)]
        sources.append(column)
    every = [stride * number + place for number, count in enumerate(many) for place in range(count)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(every)), max_size=3)))
    runs = [every[start:end] for start, end in itertools.pairwise([0, *cuts, len(every)])]
    order = data.draw(
        st.one_of(
            st.permutations(every), st.permutations(runs).map(lambda runs: [*itertools.chain.from_iterable(runs)])
        )
    )
    order = order * data.draw(st.sampled_from([1, 20]))
    found = gathered(order, sources, stride)
    expected = [100.0 * (item // stride) + item % stride for item in order]
    assert [sketch.mean for sketch in found] == expected
    assert [sketch.count for sketch in found] == [item % stride + 1 for item in order]
