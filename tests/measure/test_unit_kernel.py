"""The Triton kernels that tally units: a NumPy twin under Triton's interpreter, and code for devices not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instrument.measure.device import unit_kernel

from .child import answer

CHILD = """
import importlib
import json
import math
import warnings
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

from instrument.measure.device import Devices
from instrument.measure.pending import ALONE
from instrument.measure.slopes import slopes_named
from instrument.measure.tensors import whole
from instrument.measure.units import rows_together, tally_on_device, tally_rows
from instrument.torch_private import Unseen
from instrument.watcher.units import UnitJudge
from tests.measure.test_device import Queue

warnings.simplefilter("ignore")
queue = Queue()


def take_for_devices(edge):
    '''From now on all tensors lie on devices of this edge, or on none.'''
    for name in ("measure.device.devices", "measure.device.late", "measure.batch", "watcher.collector"):
        importlib.import_module("instrument." + name).edge_for = lambda device: edge


take_for_devices(queue)
generator = torch.Generator().manual_seed(0)
checked = {"tallies": 0, "rows": 0, "steps": 0, "launches": 0}


def twin(tensor, axis, slopes):
    '''What the units did, by float64 loops of NumPy over the definition.'''
    cube = tensor.double().numpy()
    cube = cube.reshape(math.prod(cube.shape[:axis]), cube.shape[axis], -1)
    is_nan = np.isnan(cube).any((0, 2))
    low, high = np.where(is_nan, np.nan, cube.min((0, 2))), np.where(is_nan, np.nan, cube.max((0, 2)))
    if slopes is None:
        return low, high, np.zeros(len(low)), np.zeros(len(low), bool)
    def within(tails):
        bounds = np.float32(tails.low), np.float32(tails.high)
        return (cube <= bounds[0]) | (cube >= bounds[1])
    return low, high, within(slopes.flat).all(2).sum(0), within(slopes.dead).all((0, 2))


def check(tensor, axis, slopes):
    devices, before = Devices(), len(queue.copies)
    with Unseen():
        assert devices.can_tally(tensor)
        late = tally_on_device(tensor, axis, slopes, devices)
    devices.send()
    found = late.fetch()
    for ours, theirs in zip((found.low, found.high, found.flat, found.dead_flat), twin(tensor, axis, slopes)):
        np.testing.assert_array_equal(ours, theirs, err_msg=str((tensor.shape, tensor.dtype, axis, slopes)))
    assert (late.samples, found.samples, len(queue.copies)) == (math.prod(tensor.shape[:axis]),) * 2 + (before + 1,)
    checked["tallies"] += 1
    return found


SHAPES = (
    ((7, 3), 1), ((1, 1), 1), ((200, 10), 1), ((70, 300), 1), ((5, 33, 17), 2), ((9, 5, 7, 7), 1), ((130, 20, 4), 1),
    ((3, 2, 40, 40), 1), ((2, 3, 1), 1), ((70, 2, 300), 1),
)
with np.errstate(all="ignore"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, axis in SHAPES if dtype is torch.float32 else SHAPES[2:6]:
            for function, with_special in ((None, True), ("relu", False), ("tanh", True)):
                slopes = slopes_named(function) if function else None
                z = torch.randn(shape, generator=generator) * 3
                z.select(axis, 0).fill_(-5.0)
                if shape[axis] > 1:  # flat for tanh, and not dead
                    z.select(axis, 1).fill_(2.5)
                if with_special:
                    z.view(-1)[0], z.view(-1)[-1] = math.nan, math.inf
                z = z.to(dtype)
                found = check(z, axis, slopes)
                sample = z.reshape(math.prod(shape[:axis]), -1)[::61].double()
                np.testing.assert_allclose(found.square_mean, float(sample.square().mean()), rtol=1e-12)
    # Of channels last the range is found as it lies.
    check(torch.randn(3, 5, 4, 4, generator=generator).to(memory_format=torch.channels_last), 1, None)
    # A few large images are left to operations of torch.
    assert type(tally_on_device(torch.ones(2, 1, 5000), 1, None, Devices())._numbers).__name__ == "Marked"
    # More columns than a block has, one tally behind the other, are apart.
    devices, tensors = Devices(), [torch.randn(2, n, generator=generator) for n in (5000, 3, 5000, 9001, 7)]
    with Unseen():
        lates = [tally_on_device(tensor, 1, None, devices) for tensor in tensors]
    devices.send()
    for late, tensor in zip(lates, tensors):
        assert late.fetch().low.tolist() == tensor.amin(0).tolist()

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    shapes = ((5, 3), (40, 130), (1, 1), (70, 64), (3, 2, 3, 3), (4, 1))
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    gradients[0][1] = math.nan
    gradients[1][3] = gradients[1][39, :129] = 0
    gradients[3][:], gradients[3][:, 0] = 0, -0.0
    gradients[4][2] = 0
    gradients[5][1] = 5e-324 if dtype is torch.float64 else 1e-40
    devices = Devices()
    with Unseen():
        assert all(devices.can_find_rows(gradient) for gradient in gradients)
        lates = rows_together(gradients, [4] * 6, devices)
    devices.send()
    for gradient, late in zip(gradients, lates):
        found, expected = late.fetch(), tally_rows(gradient, 0, 4)
        assert found.dead_flat.tolist() == expected.dead_flat.tolist()
        assert found.dead_flat.tolist() == [bool((row == 0).all()) for row in gradient]
        assert (found.samples, found.counted, found.witness) == (expected.samples, expected.counted, expected.witness)
        checked["rows"] += 1

# A training whose units are tallied like that leaves the tallies of the host, and makes one copy a step.
import instrument
from torch import nn

from tests.training import batch


WINDOW = {"dead_window_samples": 32, "dead_window_batches": 2}


def train(directory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 4))
    model[0].bias.data[3] = -100.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, logdir=directory, interval=1, config=WINDOW, strict=True)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    watcher.flush()
    return watcher


take_for_devices(None)
plain = train(mkdtemp())
take_for_devices(queue)
importlib.import_module("instrument.measure.batch").small = lambda tensor: (0, 0)
importlib.import_module("instrument.measure.batch").small_together = lambda tensors: None


def tally(self, tensor, axis, slopes):
    with Unseen():
        return tally_on_device(whole(tensor), axis, slopes, self._devices), ALONE


def counted(gradients, *arguments):
    checked["launches"] += 1
    return rows_together(gradients, *arguments)


importlib.import_module("instrument.watcher.rows").rows_together = counted
UnitJudge._tally = tally
before = len(queue.copies)
ours = train(mkdtemp())
assert len(queue.copies) == before + 3, len(queue.copies) - before
status, expected = ours.dead_units(), plain.dead_units()
assert status.keys() == expected.keys() and {"1", "2"} <= status.keys(), status.keys()
for name, of_host in expected.items():
    assert repr(status[name]) == repr(of_host), (name, status[name], of_host)
assert 3 in status["1"].dead, status["1"]
checked["steps"] = len(ours.history)
ours.close()
plain.close()
print(json.dumps(checked))
"""

COMPILED = """
import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from instrument.measure.device import kernel, unit_kernel

WIDE = re.compile(r"ld\\.global[.\\w]*\\.(v4\\.b32|v2\\.b64|v8\\.b16)")
ALIGNED = [["tt.divisibility", 16]]
LIMITS = dict.fromkeys(("flat_low", "flat_high", "dead_low", "dead_high"), "fp32")
SIZES = dict.fromkeys(("width", "samples", "units", "positions", "run"), "i32")
DIVISIBLE = "units", "positions", "run", "width"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
found = []


def compiled(function, kind, constants, warps, options={}):
    types = {"values": "*" + SHORT[kind], "kin": "*" + SHORT[kind], "out": "*fp64", "table": "*i64", **SIZES, **LIMITS}
    types.update(codes_out="*i64", moments_out="*fp64", rows_out="*i64", size="i32")
    constants = {"KIND": kind, **constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    aligned = [n for n, name in enumerate(function.arg_names) if signature[name][0] == "*" or name in DIVISIBLE]
    source = ASTSource(function, signature, constants, {(place,): ALIGNED for place in aligned})
    for capability in (80, 90) if function.__name__ == "_units_kernel" else (90,):
        binary = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, **options})
        assert binary.asm["cubin"][:4] == b"\\x7fELF"
        found.append([function.__name__, kind, bool(WIDE.search(binary.asm["ptx"]))])


for kind, is_judged in (("bfloat16", True), ("float16", False), ("float32", True)):
    sides = {"IS_JUDGED": is_judged, "UNITS": 256, "SAMPLES": 8}
    compiled(unit_kernel._units_kernel, kind, sides, 8)
    sides = {"IS_JUDGED": is_judged, "UNITS": 2, "POSITIONS": 1024}
    compiled(unit_kernel._positions_kernel, kind, sides, 8)
for kind in ("bfloat16", "float64"):
    compiled(unit_kernel._rows_kernel, kind, {"ROWS": 32, "COLUMNS": 64}, 4)
    sides = {"ROWS": 1024, "FEW_ROWS": 256, "COLUMNS": 16 * 8 // int(kind.strip("bfloat")), "IS_SHARED": True}
    compiled(kernel._values_kernel, kind, sides, 8, {"maxnreg": 80})
compiled(kernel._runs_kernel, "bfloat16", {**sides, "COLUMNS": 8, "IS_ALIGNED": True}, 8, {"maxnreg": 80})
print(json.dumps(found))
"""


def test_the_kernels_tally_as_a_twin_does() -> None:
    """For every type, layout, function and special value, and in a training: ranges, flat samples, dead units, rows."""
    assert answer(CHILD, TRITON_INTERPRET="1") == {
        "tallies": (10 + 4 + 4) * 3 + 1,
        "rows": 18,
        "steps": 3,
        "launches": 3,
    }


def test_the_kernels_compile_for_devices_that_are_not_here(tmp_path: Path) -> None:
    """Of every kernel Triton makes code for GPUs, and large tensors are read 16 bytes at a time."""
    found = answer(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert isinstance(found, list)
    assert len(found) == 3 * 2 + 3 + 2 * 2 + 1
    narrow = {name for name, _, is_wide in found if not is_wide}
    assert narrow == {"_rows_kernel"}


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("samples", [1, 63, 64, 65, 1000, 33_000, 5_000_000])
@pytest.mark.parametrize("programs", [1, 12, 197, 600])
def test_runs_take_in_every_sample(samples: int, programs: int, multiple: int) -> None:
    """Runs are whole multiples of what is asked for, and no more of them than samples need."""
    run = unit_kernel._run(samples, programs, 256, multiple)
    assert run % multiple == 0
    assert (-(-samples // run) - 1) * run < samples


def test_a_table_of_rows_has_every_row_once() -> None:
    """Addresses and places of the rows of three gradients, counted one by one."""
    rows, lengths = np.array([70, 1, 64]), np.array([3, 5, 2])
    table = unit_kernel.row_table(np.array([1000, 9000, 20_000]), rows, lengths, 4)
    seen = [
        (address + 4 * row * length, length, place + row)
        for address, count, length, place in table.tolist()
        for row in range(count)
    ]
    begins = zip((1000, 9000, 20_000), rows.tolist(), lengths.tolist(), (0, 70, 71), strict=True)
    assert seen == [
        (address + 4 * row * length, length, place + row)
        for address, count, length, place in begins
        for row in range(count)
    ]
