"""The loops in C find what NumPy finds: codes and counts to the last one, and moments to the last digits."""

from __future__ import annotations

import ctypes
import math
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from instrument import measure
from instrument.errors import UnmeasurableError
from instrument.measure import native
from instrument.measure.batch import measure_many
from instrument.measure.device.rows import WIDTH, sketches_of_rows
from instrument.measure.histogram import CODES, INF_CODE
from instrument.measure.native import library
from instrument.measure.slopes import slopes_named
from instrument.measure.units import UnitTally, tally_rows, tally_units
from instrument.torch_private import Unseen

from .twin import assert_measures

needs_c = pytest.mark.skipif(not native.is_there(), reason="the package was installed without a compiler")

SIZES = (1, 2, 15, 16, 17, 63, 2047, 2048, 2049, 4096, 5000, 32_768, 32_769, 131_072, 131_073, 300_001)
SPECIAL = (
    0.0,
    -0.0,
    math.nan,
    -math.nan,
    math.inf,
    -math.inf,
    1e-45,
    -1e-45,
    1.4e-39,
    -1.4e-39,
    1.5e-39,
    3.4e38,
    -3.4e38,
)


@contextmanager
def numpy_alone() -> Iterator[None]:
    loaded, library.loaded = library.loaded, None
    try:
        yield
    finally:
        library.loaded = loaded


def values_of(size: int, special: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over many decades, of which a share `special` is what sketches must take care of."""
    generator = np.random.default_rng(size)
    values = (generator.standard_normal(size) * 10.0 ** generator.integers(-30, 30, size)).astype(np.float32)
    chosen = generator.random(size) < special
    values[chosen] = generator.choice(np.array(SPECIAL, np.float32), int(chosen.sum()))
    return torch.from_numpy(values).to(dtype)


def test_a_compiler_at_hand_was_used() -> None:
    """Where this machine has a compiler, the package was built with it: the tests below are not skipped by mistake."""
    assert native.is_there() or shutil.which("cc") is None


@needs_c
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("special", [0.0, 0.0005, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_counts_are_those_of_numpy(size: int, special: float, dtype: torch.dtype) -> None:
    """At every edge of runs, lanes and blocks, with any share of NaN, Inf, zeros and tiny values."""
    values = values_of(size, special, dtype)
    found = measure(values)
    with numpy_alone():
        expected = measure(values)
    assert found.codes.tolist() == expected.codes.tolist()
    assert found.counts.tolist() == expected.counts.tolist()
    assert_measures(found, values.double().numpy())


@needs_c
@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.uint32, st.integers(1, 300)))
def test_any_bits_of_float32_are_sketched_as_numpy_does(bits: npt.NDArray[np.uint32]) -> None:
    """Whatever bits stand in memory, one tensor by itself, many together and NumPy agree."""
    values = torch.from_numpy(bits.view(np.float32))
    alone = measure(values)
    together = measure_many([values, torch.ones(3), values])
    with numpy_alone():
        expected = measure(values)
    for found in (alone, together[0], together[2]):
        assert not isinstance(found, Exception)
        assert (found.codes.tolist(), found.counts.tolist()) == (expected.codes.tolist(), expected.counts.tolist())
        assert (found.count, found.zero_count, found.nan_count, found.inf_count) == (
            expected.count, expected.zero_count, expected.nan_count, expected.inf_count,
        )  # fmt: skip
        assert (found.low, found.high) == (expected.low, expected.high)


@needs_c
def test_counts_do_not_run_over_in_one_table() -> None:
    """A million equal values, which all meet in one place of the tables, are a million."""
    sketch = measure(torch.full((1_000_003,), 0.5))
    assert (sketch.counts.tolist(), sketch.total, sketch.total_squares) == ([1_000_003], 500_001.5, 250_000.75)


@needs_c
def test_sums_are_of_float64() -> None:
    """Squares beyond float32 are finite, and a spread that float32 would lose far from zero is kept."""
    assert measure(torch.full((100,), 1e30)).rms == pytest.approx(1e30)
    far = torch.tensor([16_777_214.0, 16_777_216.0]).repeat(50_000)
    assert measure(far).std == pytest.approx(1.0)


@needs_c
@pytest.mark.parametrize("shape", [(7, 5), (64, 32), (513, 3), (9, 1025), (3, 5000), (1, 1), (300, 2048)], ids=str)
@pytest.mark.parametrize("positions", [(), (1,), (3,), (16,), (17, 5), (50, 50)], ids=str)
@pytest.mark.parametrize("special", [0.0, 0.001])
def test_ranges_and_flat_samples_are_those_of_numpy(
    shape: tuple[int, int], positions: tuple[int, ...], special: float
) -> None:
    """For rows long and short and images large and small; NaN of either sign spoils its unit and no other."""
    if math.prod(shape) * math.prod(positions) > 2_000_000:
        shape = (2, shape[1])
    values = values_of(math.prod((*shape, *positions)), special).reshape(*shape, *positions)
    values = torch.where(values.isfinite(), values.clamp(-3, 3), values)
    for name in ("relu", "tanh", None):
        slopes = slopes_named(name) if name else None
        with Unseen():
            found = tally_units(values, 1, slopes)
            with numpy_alone():
                expected = tally_units(values, 1, slopes)
        assert isinstance(found, UnitTally)
        assert isinstance(expected, UnitTally)
        assert (found.samples, found.counted) == (expected.samples, expected.counted)
        for field in ("low", "high", "flat", "dead_flat", "never_flat"):
            assert np.array_equal(getattr(found, field), getattr(expected, field), equal_nan=field in ("low", "high"))


@needs_c
def test_the_scale_of_units_is_that_of_the_values() -> None:
    """The mean square of a sample is near that of all, for rows, images, and images with channels last."""
    for shape in ((4096, 64), (32, 16, 32, 32), (8, 700, 4)):
        values = torch.randn(shape) * 3
        memory = (values, values.contiguous(memory_format=torch.channels_last)) if values.dim() == 4 else (values,)
        for tensor in memory:
            with Unseen():
                tally = tally_units(tensor, 1, None)
            assert isinstance(tally, UnitTally)
            assert tally.square_mean == pytest.approx(9.0, rel=0.15)
            assert tally.low.tolist() == values.amin([d for d in range(values.dim()) if d != 1]).double().tolist()


@needs_c
def test_rows_of_either_zero_are_zero() -> None:
    """Rows of 0.0 and -0.0 are found; one value anywhere, however small, keeps a row alive."""
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.zeros(6, 33, dtype=dtype)
        gradient[1] = -0.0
        gradient[2, 32], gradient[4, 0], gradient[5, 7] = 1e-38, -1.0, math.nan
        with Unseen():
            tally = tally_rows(gradient, 0, 4)
            whole = tally_rows(torch.ones(3, 3, dtype=dtype), 0, 4)
        assert isinstance(tally, UnitTally)
        assert isinstance(whole, UnitTally)
        assert tally.dead_flat.tolist() == [True, True, False, True, False, False]
        assert not whole.dead_flat.any()


@needs_c
def test_what_cannot_be_read_as_it_lies_goes_another_way() -> None:
    """Strided, negated, freed, empty and other tensors are not for C."""
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    negated = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    others = [torch.ones(4, 4).t(), torch.ones(8)[::2], negated, freed, torch.empty(0), torch.ones(2).double()]
    others += [torch.ones(2, device="meta"), torch.ones(3).to_sparse(), torch._efficientzerotensor((4, 5))]
    assert [native.can_read(tensor) for tensor in others] == [False] * len(others)
    assert native.can_read(torch.ones(2, requires_grad=True))


@needs_c
def test_an_object_of_another_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that was built of other sources, as after an update in place, is not called."""
    monkeypatch.setattr(library, "_INTERFACE", library._INTERFACE + 1)
    assert library._load() is None


@needs_c
def test_an_object_that_does_not_load_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken file in its place, or one without the functions, means NumPy and no error."""

    def broken(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: wrong ELF class")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    assert library._load() is None


@needs_c
@pytest.mark.parametrize("size", [100, 20_000])
def test_no_memory_is_read_that_is_gone(size: int) -> None:
    """A view behind the start of a storage that was freed or cut has an address and no values: that is told."""
    for left in (0, size):
        base = torch.ones(3 * size)
        view = base[size : 2 * size]
        base.untyped_storage().resize_(4 * left)
        assert view.data_ptr() != 0
        assert not native.can_read(view)
        if not left:
            with pytest.raises(UnmeasurableError, match="freed"):
                measure(view)
            (found,) = measure_many([view])
            assert isinstance(found, UnmeasurableError)
            with Unseen(), pytest.raises(UnmeasurableError, match="freed"):
                tally_rows(view.view(10, -1), 0, 1)


@needs_c
def test_who_measures_in_the_middle_of_a_measurement_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer may run at any place, and what it measures goes into no room that is in use."""
    loaded = library.loaded
    assert loaded is not None
    inside: list[float] = []

    def interrupted(function: Callable[..., float]) -> Callable[..., float]:
        def call(*arguments: object) -> float:
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(library, "loaded", loaded)
                inside.append(measure(torch.full((5000,), 7.0)).mean)
                found = function(*arguments)
                with Unseen():
                    tally_units(torch.full((50, 60), 7.0), 1, None)
                    tally_rows(torch.zeros(300, 2), 0, 1)
                inside.append(measure(torch.full((9,), 7.0)).mean)
            return found

        return call

    keeping = library._Functions(*map(interrupted, loaded.keeping))
    monkeypatch.setattr(library, "loaded", loaded._replace(keeping=keeping))
    sketch = measure(torch.tensor([1.0, 2.0, 3.0]))
    assert (sketch.count, sketch.low, sketch.high, sketch.total) == (3, 1.0, 3.0, 6.0)
    with Unseen():
        tally = tally_units(torch.tensor([[1.0, 5.0], [2.0, -5.0]]), 1, None)
        rows = tally_rows(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), 0, 1)
    assert isinstance(tally, UnitTally)
    assert isinstance(rows, UnitTally)
    assert (tally.low.tolist(), tally.high.tolist()) == ([1.0, -5.0], [2.0, 5.0])
    assert rows.dead_flat.tolist() == [True, False]
    assert len(inside) == 6
    assert set(inside) == {7.0}


@needs_c
def test_shared_arrays_of_tallies_cannot_be_changed() -> None:
    """Gradients without a row of zeros share the arrays of their tallies, which refuse to be written to."""
    with Unseen():
        first, second = (tally_rows(torch.ones(3, 2), 0, samples) for samples in (4, 5))
    assert isinstance(first, UnitTally)
    assert isinstance(second, UnitTally)
    assert first.flat is second.flat
    assert (first.samples, second.samples) == (4, 5)
    for array in (first.low, first.high, first.flat, first.dead_flat):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@needs_c
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 65_535), st.integers(1, 11)), max_size=40), st.integers(0, 3))
def test_patterns_of_16_bits_are_counted_as_numpy_does(runs: list[tuple[int, int]], first: int) -> None:
    """Whatever comes how often in a row, and wherever it begins: patterns in their order, and counts, each time."""
    values = np.repeat([pattern for pattern, _ in runs], [count for _, count in runs]).astype(np.uint16)[first:]
    expected, counts = np.unique(values, return_counts=True)
    for _ in range(2):
        present, found = native.patterns_of(values)
        assert (present.tolist(), found.tolist()) == (expected.tolist(), counts.tolist())


@needs_c
@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.int64, (5, 12), elements=st.integers(0, 2**53)),
    st.lists(st.integers(0, CODES - 1), min_size=12, max_size=12, unique=True),
    arrays.arrays(np.float64, (5, 5), elements=st.floats(allow_nan=False)),
    st.integers(-1, 4),
)
def test_rows_of_a_device_are_sketched_as_numpy_does(
    counts: npt.NDArray[np.int64], codes: list[int], moments: npt.NDArray[np.float64], missing: int
) -> None:
    """Counts at any codes, zeros, Inf and NaN among them, any moments, and a row that could not be measured."""
    rows = np.zeros((5, WIDTH), np.int64)
    rows[:, codes] = counts
    rows[:, INF_CODE - 1 : INF_CODE + 3] += counts[:, :4]
    moments = moments.copy()
    if missing >= 0:
        moments[missing, 0] = np.nan
    rows[:, CODES : CODES + 5] = moments.view(np.int64)
    found = sketches_of_rows(torch.from_numpy(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "is_there", lambda: False)
        expected = sketches_of_rows(torch.from_numpy(rows))
    for field in ("codes", "counts", "ends", "numbers"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)


@needs_c
def test_a_large_tensor_with_gaps_is_copied_in_pieces() -> None:
    """Patterns of 4 million bfloat16 that do not lie side by side are counted with room for a part at a time."""
    patterns = torch.randint(-30_000, 30_000, (8_000_000,), generator=torch.Generator().manual_seed(0))
    tensor = patterns.to(torch.int16).view(torch.bfloat16)[::2]
    tracemalloc.start()
    try:
        assert measure(tensor).count > 3_900_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
