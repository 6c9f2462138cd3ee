"""The Triton kernels under Triton's interpreter: the codes of the CPU engine, one by one."""

from __future__ import annotations

from .child import answer

CHILD = """
import json
import warnings

import numpy as np
import torch

from instrument.measure.custom_op import measure
from instrument.measure.device import DeviceBatch
from instrument.measure.device.accumulating import kernel_for
from instrument.measure.sketch import Sketch, merge_all
from instrument.measure.tensors import readable
from instrument.torch_private import Unseen
from tests.measure.test_device import SPECIAL, TYPES, Queue, assert_same

warnings.simplefilter("ignore")
cpu = torch.device("cpu")
assert kernel_for(cpu).__name__ == "instrument.measure.device.kernel"
launches = []
for name in ("accumulate_values", "accumulate_runs"):
    original = getattr(kernel_for(cpu), name)
    def counted(*args, original=original, name=name):
        launches.append(name)
        original(*args)
    setattr(kernel_for(cpu), name, counted)

generator = torch.Generator().manual_seed(0)
checked = 0
for dtype in TYPES:
    decades = torch.logspace(-30, 30, 9000, dtype=torch.float64)
    spread = torch.randn(9000, generator=generator, dtype=torch.float64) * decades
    patterns = torch.randint(-(2**31), 2**31 - 1, (5000,), generator=generator, dtype=torch.int32).view(torch.float32)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    cases = [spread, special, patterns.double(), torch.zeros(1), torch.empty(0), spread[:4500].repeat(8)]
    # One value that is not plain among whole blocks of those that are.
    plain = torch.linspace(-3, 3, 9000, dtype=torch.float64)
    cases += [torch.cat((plain, special[n : n + 1])).roll(77) for n in range(11)]
    for values in cases:
        tensor = values.to(dtype)
        with Unseen():
            later = DeviceBatch(cpu, Queue()).add(readable(tensor))
        assert_same(later.sketch(), measure(tensor))
        checked += 1
    # Of several runs each, begun where 16 bytes do not divide the address, and behind whole blocks a part of one.
    long = spread[:4500].repeat(8).to(dtype)
    small = [spread[start : start + 1 + 37 * start % 1500].to(dtype) for start in range(0, 700, 23)]
    small += [long, long[3:], long[:33_000], torch.ones(4096).to(dtype), torch.zeros(4097).to(dtype)]
    batch = DeviceBatch(cpu, Queue())
    before = len(launches)
    with Unseen():
        together = batch.add_many(small)
    assert launches[before:] == ["accumulate_runs"] * 2
    for later, tensor in zip(together, small, strict=True):
        assert_same(later.sketch(), measure(tensor))
        checked += 1
matrix = torch.arange(60.0).view(20, 3)
strided = (matrix[:, 0], matrix[:, :1].expand(-1, 4), torch.arange(40.0)[::2])
others = (torch.arange(300), torch.tensor([True, False]), torch.ones(3, 1).expand(3, 5), torch.eye(4).to_sparse())
for tensor in strided + others:
    with Unseen():
        later = DeviceBatch(cpu, Queue()).add(readable(tensor))
    assert_same(later.sketch(), measure(tensor))
    checked += 1
print(json.dumps({"checked": checked, "launches": len(launches)}))
"""


def test_the_kernels_give_the_codes_of_the_cpu_engine() -> None:
    """For every type, over sixty decades, random bit patterns and special values: counts and extremes are equal."""
    counted = answer(CHILD, TRITON_INTERPRET="1")
    assert isinstance(counted, dict)
    assert counted["checked"] == 4 * (17 + 36) + 7
    assert counted["launches"] >= 4 * 17
