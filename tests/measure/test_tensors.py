"""Every kind of tensor: measured rightly, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from instrument.errors import InstrumentError, UnmeasurableError
from instrument.measure.custom_op import measure
from instrument.measure.narrow import MANY
from instrument.measure.sketch import CODES, Sketch

from .twin import assert_measures

pytestmark = pytest.mark.usefixtures("engine")

FLOAT_TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
INTEGER_TYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 1000, 140_000])
def test_floating_point_types(dtype: torch.dtype, size: int) -> None:
    """All floating-point types measure as their values converted to float64, at every size."""
    values = (torch.randn(size) * 2).to(dtype)
    assert_measures(measure(values), values.to(torch.float32).to(torch.float64).numpy())


@pytest.mark.parametrize("dtype", INTEGER_TYPES, ids=str)
def test_integer_types(dtype: torch.dtype) -> None:
    """All integer types measure as their values, with exact extremes."""
    values = torch.randint(0, 100, (5000,)).to(dtype)
    assert_measures(measure(values), values.to(torch.int64).numpy())


def test_large_integers_keep_their_extremes() -> None:
    """Integers that no float32 holds have exact extremes and sums."""
    values = torch.tensor([2**40 + 1, -(2**40) - 3, 0])
    sketch = measure(values)
    assert (sketch.min, sketch.max, sketch.total) == (-(2.0**40) - 3, 2.0**40 + 1, -2.0)


def test_bool_counts_true_as_one() -> None:
    """A mask measures as zeros and ones."""
    sketch = measure(torch.tensor([True, False, False, False]))
    assert (sketch.mean, sketch.zero_fraction) == (0.25, 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "finite", "NaN alone", "tiny"])
def test_large_tensors_of_every_pattern_of_sixteen_bits(dtype: torch.dtype, which: str) -> None:
    """Of each bit pattern so many: the codes of the way through float32, and the statistics of float64."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    chosen = {
        "all": patterns,
        "finite": patterns[patterns.isfinite()],
        "NaN alone": patterns[patterns.isnan()],
        "tiny": patterns[patterns.float().abs() < (1e-39 if dtype is torch.bfloat16 else 1e-6)],
    }[which]
    generator = torch.Generator().manual_seed(0)
    values = chosen[torch.randint(0, chosen.numel(), (4, 140_003), generator=generator)]
    assert values.numel() > MANY  # beyond it there is another way
    sketch = measure(values)
    assert_measures(sketch, values.double().numpy())
    as_float32 = measure(values.float())
    assert sketch.codes.tolist() == as_float32.codes.tolist()
    assert sketch.counts.tolist() == as_float32.counts.tolist()
    assert measure(values.t()) == sketch
    part, same = measure(values[:, 1:]), measure(values[:, 1:].contiguous())
    assert (part.codes.tolist(), part.counts.tolist()) == (same.codes.tolist(), same.counts.tolist())
    assert_measures(part, values[:, 1:].double().numpy())
    assert measure(values.expand(3, 4, 140_003)).counts.tolist() == (3 * sketch.counts).tolist()


def test_tiny_bfloat16_is_not_zero() -> None:
    """1e-9 in bfloat16, which a way through float16 would make zero, is not zero."""
    sketch = measure(torch.full((10,), 1e-9, dtype=torch.bfloat16))
    assert sketch.zero_fraction == 0.0
    assert sketch.max == pytest.approx(1e-9, rel=0.01)


def test_signalling_nan_is_counted_without_a_word() -> None:
    """NaN of the kind that makes processors signal is NaN like any other, in every floating-point type."""
    for bits, integer, dtype in (
        (0x7F800001, torch.int32, torch.float32),
        (0x7FF0000000000001, torch.int64, torch.float64),
        (0x7F81, torch.int16, torch.bfloat16),
        (0x7C01, torch.int16, torch.float16),
    ):
        sketch = measure(torch.tensor([bits, 0], dtype=integer).view(dtype))
        assert (sketch.nan_count, sketch.inf_count, sketch.count) == (1, 0, 1)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_complex_measures_as_magnitude(dtype: torch.dtype) -> None:
    """Complex values measure by their magnitude, conjugated views too."""
    values = torch.randn(300, dtype=torch.complex128).to(dtype)
    truth = values.to(torch.complex128).abs().numpy()
    if dtype is torch.complex32:
        assert measure(values).rms == pytest.approx(np.sqrt((truth**2).mean()), rel=1e-3)
        return
    sketch = measure(values)
    assert sketch.rms == pytest.approx(np.sqrt((truth**2).mean()), rel=1e-6)
    assert measure(values.conj()) == sketch


def test_a_negated_view_is_negative() -> None:
    """The imaginary part of a conjugated tensor, a view whose memory holds the other sign, has its own sign."""
    values = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert values.is_neg()
    assert measure(values).min == -4.0


LAYOUTS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("transposed", lambda x: x.mT),
    ("permuted", lambda x: x.permute(2, 0, 1)),
    ("every second", lambda x: x[::2, 1::3, ::2]),
    ("channels last", lambda x: x[None].contiguous(memory_format=torch.channels_last)),
    ("overlapping windows", lambda x: x.reshape(-1).unfold(0, 7, 3)),
    ("expanded", lambda x: x[:, :1, :].expand(-1, 50, -1)),
    ("expanded scalar", lambda x: x[0, 0, 0].expand(3, 4)),
    ("rolled storage", lambda x: x[3:, 2:, 1:]),
    ("0-dim", lambda x: x[0, 0, 0]),
    ("empty", lambda x: x[:0]),
]


@pytest.mark.parametrize(("name", "change"), LAYOUTS, ids=[name for name, _ in LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_any_strides(name: str, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    """Views of any strides measure as the elements they show, each as often as it is shown."""
    values = change((torch.randn(40, 60, 70) * 10).to(dtype))
    assert_measures(measure(values), values.to(torch.float64).numpy())


def test_a_wide_row_that_is_not_contiguous() -> None:
    """A strided view whose rows alone exceed a block is cut within the rows."""
    values = torch.randn(2, 300_000)[:, ::2]
    assert_measures(measure(values), values.numpy())


def test_more_than_two_to_the_31_elements() -> None:
    """A tensor beyond 2^31 elements is counted in full."""
    values = torch.ones(2**31 + 5, dtype=torch.int8)
    values[-1] = 3
    sketch = measure(values)
    assert (sketch.count, sketch.max, sketch.total) == (2**31 + 5, 3.0, 2.0**31 + 7)


def test_an_expanded_tensor_beyond_memory() -> None:
    """An expanded view of 2^40 elements is counted without visiting each."""
    sketch = measure(torch.tensor([2.0]).expand(2**40))
    assert (sketch.count, sketch.mean, sketch.std) == (2**40, 2.0, 0.0)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_counts_the_zeros_it_implies(layout: torch.layout) -> None:
    """A sparse tensor measures as its dense twin."""
    dense = torch.randn(30, 20) * (torch.rand(30, 20) < 0.2)
    assert_measures(measure(dense.to_sparse(layout=layout)), dense.numpy())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_entries_for_one_place_are_added() -> None:
    """Uncoalesced entries, as of an embedding seen twice, count as their sum."""
    values = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.tensor([2.0, -2.0, 5.0]), (6,))
    assert_measures(measure(values), np.array([0.0, 0.0, 0.0, 5.0, 0.0, 0.0]))


class Labelled(torch.Tensor):
    """A subclass in Python that refuses every function."""

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> None:
        raise AssertionError("a function of torch was called on the user's subclass")


def test_a_python_subclass_is_measured_and_not_called() -> None:
    """A tensor subclass is measured as the plain tensor it is, and its functions are never called."""
    values = torch.ones(5).as_subclass(Labelled)
    assert measure(values).count == 5


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def _freed() -> torch.Tensor:
    values = torch.ones(8)
    values.untyped_storage().resize_(0)
    return values


REFUSED: list[tuple[str, Callable[[], torch.Tensor], str]] = [
    ("meta", lambda: torch.ones(3, device="meta"), "meta device"),
    ("fake", _fake, "fake tensor"),
    ("quantized", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
    ("nested", _nested, "Nested|nested"),
    ("lazy", lambda: torch.nn.UninitializedParameter(), "lazy"),
    ("freed", _freed, "storage is freed"),
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize(("name", "make", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_what_has_no_values_is_refused_with_the_reason(
    name: str, make: Callable[[], torch.Tensor], reason: str
) -> None:
    """A tensor without readable values raises an error that says why."""
    with pytest.raises(UnmeasurableError, match=reason):
        measure(make())


def test_something_else_than_a_tensor_is_refused() -> None:
    """A list is refused with its type."""
    with pytest.raises(InstrumentError, match=r"given list, allowed is a torch\.Tensor"):
        measure([1.0])  # type: ignore[arg-type]


def test_measuring_is_seen_by_no_mode_and_changes_nothing() -> None:
    """A flop counter sees no operation of ours, no graph is built, no random number drawn, nothing changed."""
    values = torch.randn(64, 64, requires_grad=True)
    before, state = values.detach().clone(), torch.get_rng_state()
    with FlopCounterMode(display=False) as counter, torch.profiler.profile() as profile:
        measure(values)
        assert counter.get_total_flops() == 0
        (values @ values).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64**3
    assert profile is not None
    assert torch.equal(values, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_in_inference_mode_and_on_another_default_device() -> None:
    """Inference mode, another default device and another default type change no result."""
    truth = measure(torch.arange(100.0))
    values = torch.arange(100.0)
    with torch.inference_mode(), torch.device("meta"):
        assert measure(values) == truth


def test_measuring_in_several_threads_at_once() -> None:
    """Threads have scratch of their own: what they measure at once is what each would measure alone."""
    from concurrent.futures import ThreadPoolExecutor

    tensors = [torch.full((50_000,), float(i)) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        sketches = list(pool.map(measure, tensors))
    assert [sketch.mean for sketch in sketches] == [float(i) for i in range(40)]


def test_the_custom_operator_adds_to_its_accumulators() -> None:
    """`torch.ops.instrument.measure` adds to codes and moments in place, and has a fake implementation."""
    codes = torch.zeros(CODES, dtype=torch.int64)
    moments = torch.tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)
    values = torch.randn(1000)
    torch.ops.instrument.measure(values[:600], codes, moments)
    torch.ops.instrument.measure(values[600:], codes, moments)
    assert_measures(Sketch.from_dense(codes.numpy(), moments.tolist()), values.numpy())
    assert moments[0] == 1000
    torch.library.opcheck(torch.ops.instrument.measure.default, (values, codes, moments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_custom_operator_stands_in_a_full_graph(backend: str) -> None:
    """Under `fullgraph=True` the operator compiles without a break and measures what passes through."""
    codes = torch.zeros(CODES, dtype=torch.int64)
    moments = torch.tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.instrument.measure(y, codes, moments)
        return y.relu()

    values = torch.randn(100)
    torch.compile(forward, backend=backend, fullgraph=True)(values)
    assert_measures(Sketch.from_dense(codes.numpy(), moments.tolist()), (values * 2).numpy())
