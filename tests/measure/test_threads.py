"""Large tensors: the same to the last bit however many threads torch may use, and in a forked child."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from instrument import Sketch, measure
from instrument.measure.cpu import BLOCK

pytestmark = pytest.mark.usefixtures("engine")

SIZE = 4 * BLOCK + 17


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fields(sketch: Sketch) -> tuple[object, ...]:
    return (
        sketch.codes.tolist(), sketch.counts.tolist(), sketch.total, sketch.total_squares, sketch.low, sketch.high,
        sketch.count, sketch.zero_count, sketch.nan_count, sketch.inf_count,
    )  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, generator=generator)
    spoilt = values.clone()
    spoilt[[0, SIZE // 2, SIZE - 1]] = torch.tensor([float("nan"), float("inf"), 0.0])
    rows = values[: SIZE // 8 * 8].view(8, -1)
    return {
        "float32": values,
        "bfloat16": values.bfloat16(),
        "float16": values.half(),
        "float64": values.double(),
        "int64": (values * 100).long(),
        "complex64": torch.complex(values, -values),
        "NaN and Inf": spoilt,
        "transposed": rows.t(),
        "every second": rows[:, ::2].repeat(1, 2)[:, ::2],
        "expanded": values[:BLOCK].expand(8, BLOCK),
        "requires grad": values.clone().requires_grad_(),
    }


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("above", [0, SIZE // 3])
def test_any_number_of_threads_gives_the_same(name: str, above: int) -> None:
    """With one, two and five threads of torch the sketch is the same to the last bit, sampled or not."""
    tensor = tensors()[name]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(fields(measure(tensor, sample_above=above)))
    assert found[0] == found[1] == found[2]
    assert isinstance(found[0][6], int)


SCRIPT = f"""
import os, sys, torch
from instrument import measure
from instrument.measure.batch import Batch
torch.set_num_threads(2)
values = torch.arange({SIZE}.0)
before = measure(values)
values.add(1.0)  # torch's threads are there now
pid = os.fork()
if pid == 0:
    batch = Batch()
    items = [batch.add(torch.full((8000,), float(number))) for number in range(40)]
    is_right = [item.sketch().mean for item in items] == list(range(40)) and measure(values).total == before.total
    os._exit(0 if is_right else 1)
status = os.waitpid(pid, 0)[1]
print(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_does_not_wait_for_threads_that_it_lacks() -> None:
    """A child of a process whose torch has used its threads measures large tensors, and blocks of small ones.

    An operation of torch on as many elements would hang there.
    """
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr
