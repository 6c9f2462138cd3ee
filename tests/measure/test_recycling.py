"""Tests for memory that is given out again."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
import types
import weakref
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from instrument.measure import recycling
from instrument.measure.recycling import KEPT_BYTES, LEAST_BYTES, MOST_BYTES, copied, empty, joined, joined_tensors


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    recycling._kept.__init__()  # type: ignore[misc]  # as in a new thread


def _address(array: np.ndarray[Any, Any]) -> int:
    return array.ctypes.data


@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * LEAST_BYTES // 8),
            st.sampled_from(["keep", "view", "reshape", "memory", "tensor", "drop"]),
        ),
        max_size=40,
    )
)
def test_no_memory_is_given_out_that_a_view_still_reads(asked: list[tuple[int, str]]) -> None:
    """Whatever is done with arrays, each keeps the values written to it for as long as anything refers to it."""
    held: list[tuple[Any, int]] = []
    for number, (size, use) in enumerate(asked):
        array = empty(size, np.int64)
        array[:] = number
        if use == "keep":
            held.append((array, number))
        elif use == "view":
            held.append((array[size // 3 :][::2], number))
        elif use == "reshape":
            held.append((array[: size // 2 * 2].reshape(2, -1).T.view(np.uint64), number))
        elif use == "memory":
            held.append((memoryview(array), number))  # type: ignore[arg-type]  # NumPy tells of buffers from 3.12 on
        elif use == "tensor":
            held.append((torch.from_numpy(array)[size // 2 :].view(-1, 1), number))
        else:
            held = held[1:]
        del array
        for kept, written in held:
            assert (np.asarray(kept).astype(np.int64) == written).all()


def test_memory_comes_again_once_it_is_free() -> None:
    """The address is the same for the next array of about that size, and another one while a view is held."""
    first = empty(100_000, np.float64)
    place, view = _address(first), first[5:7]
    del first
    second = empty(100_000, np.float64)
    assert _address(second) != place
    del view
    assert _address(empty(90_000, np.float64)) == place


def test_joined_tensors_are_theirs_one_behind_the_other() -> None:
    """Of the type they had, to the bit, whatever device is the default; and they keep nothing of the parts."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = [torch.randn(size, generator=generator).to(dtype) for size in (3, 70_000, 1)]
        expected = torch.cat(parts)
        with torch.device("meta"):
            found = joined_tensors(parts)
        for part in parts:
            part.zero_()
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("size", [LEAST_BYTES - 1, MOST_BYTES + 1])
def test_small_and_huge_arrays_are_left_to_numpy(size: int) -> None:
    """Nothing of these is kept: a weak reference to what owns their memory dies with them."""
    owner = weakref.ref(empty(size, np.uint8))
    assert owner() is None


def test_what_is_kept_has_a_limit() -> None:
    """Of three times the limit at once no more than the limit is kept, and a single array is the largest part of it."""
    sizes = [MOST_BYTES] * (3 * KEPT_BYTES // MOST_BYTES)
    arrays = [empty(size, np.uint8) for size in sizes]
    owners = [weakref.ref(array.base) for array in arrays]
    del arrays
    gc.collect()
    assert sum(MOST_BYTES for owner in owners if owner() is not None) <= KEPT_BYTES


def test_each_thread_has_memory_of_its_own() -> None:
    """What one thread has let go is not given to another, and what it holds stays as it was when it has ended."""
    place = _address(empty(100_000, np.float64))
    found: list[np.ndarray[Any, Any]] = []

    def ask() -> None:
        found.append(empty(100_000, np.float64))
        found[0][:] = 7.0

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert _address(found[0]) != place
    assert (found[0] == 7.0).all()


def test_a_finalizer_in_the_middle_gets_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for while an owner is looked at lies elsewhere than what is given out then."""
    size = 100_000
    inside: list[Any] = []
    empty(size, np.float64)  # free at once
    count = recycling._references_in

    def interrupted(box: list[Any]) -> int:
        if not inside:
            inside.append(None)
            inside[0] = empty(size, np.float64)
        return count(box)

    monkeypatch.setattr(recycling, "_references_in", interrupted)
    outer = empty(size, np.float64)
    assert not np.shares_memory(outer, inside[0])


def _looking(frame: types.FrameType, event: str, argument: object) -> Any:
    """A tracer that reads variables, as debuggers do; each reading may refer to what they hold."""
    _seen.append(dict(frame.f_locals))
    del _seen[:-5]
    return _looking


_seen: list[dict[str, Any]] = []


@pytest.mark.parametrize("is_traced_first", [False, True])
def test_a_debugger_changes_nothing(is_traced_first: bool) -> None:
    """Imported or called while a tracer reads variables: what is held stays its own, and free memory comes again."""
    spec = importlib.util.spec_from_file_location("recycling_again", recycling.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    before = sys.gettrace()

    def use() -> tuple[bool, bool]:
        held = again.empty(100_000, np.float64)
        other = again.empty(100_000, np.float64)
        is_apart, place = not np.shares_memory(held, other), other.ctypes.data
        del other
        _seen.clear()
        return is_apart, again.empty(100_000, np.float64).ctypes.data == place

    sys.modules["recycling_again"] = again
    try:
        sys.settrace(_looking if is_traced_first else None)
        spec.loader.exec_module(again)
        sys.settrace(None if is_traced_first else _looking)
        is_apart, comes_again = use()
    finally:
        sys.settrace(before)
        del sys.modules["recycling_again"]
    assert is_apart
    assert comes_again or not is_traced_first  # a tracer that looks on may hold it still


def test_copies_and_joins_are_those_of_numpy() -> None:
    """Both against NumPy's own, of several types, small and large."""
    for dtype in (np.uint16, np.int64, np.float64):
        parts = [np.arange(size).astype(dtype) for size in (0, 5, 70_000, 1)]
        assert np.array_equal(joined(parts), np.concatenate(parts))
        assert joined(parts).dtype == dtype
        for part in parts:
            assert np.array_equal(copied(part[::-1]), part[::-1])
            assert not np.shares_memory(copied(part), part)
