"""DDP on two ranks: what is recorded is what both optimizers consume, and who records is who was asked to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import instrument
from instrument.diagnose.history import UnitHistory
from tests.distributed.pair import WORLD, Pair
from tests.training import hooks_on, read_back

STEPS = 5
UNIT_STEPS = 128  # a window and more


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def batch(rank: int, step: int, size: int = 6) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, rank: int, steps: int = STEPS, accumulate: int = 1) -> list[float]:
    """Plain SGD; of several micro-batches all but the last without synchronisation."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            is_last = part == accumulate - 1
            if is_last or not isinstance(model, DistributedDataParallel):
                loss = model(batch(rank, step * accumulate + part)).square().mean()
                loss.backward()
            else:
                with model.no_sync():
                    loss = model(batch(rank, step * accumulate + part)).square().mean()
                    loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def averaged_gradients(accumulate: int = 1) -> list[dict[str, torch.Tensor]]:
    """The gradients of each step, worked out in one process: the mean over ranks of the sums over micro-batches."""
    model, found = network(), []
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(WORLD):
            for part in range(accumulate):
                (model(batch(rank, step * accumulate + part)).square().mean() / WORLD).backward()
        found.append({name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
    return found


def watch_in_ddp(rank: int, logdir: str, ranks: str, wrap_first: bool, accumulate: int) -> dict[str, Any]:
    bare = DistributedDataParallel(network())
    expected = train(bare, rank, accumulate=accumulate)
    model = network()
    watched: nn.Module = DistributedDataParallel(model) if wrap_first else model
    watcher = instrument.watch(watched, ranks=ranks, interval=2, scalar_interval=1, logdir=logdir, strict=True)
    losses = train(watched if wrap_first else DistributedDataParallel(model), rank, accumulate=accumulate)
    same = [torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True)]
    watcher.flush()
    answer = {
        "same": losses == expected and all(same),
        "history": {record.step: dict(record) for record in watcher.history},
        "repr": repr(watcher),
        "notices": watcher.notices,
        "sites": [site.name for site in watcher.sites],
        "hooks": hooks_on(watched),
    }
    watcher.close()
    return answer


def assert_gradients(history: dict[int, dict[str, instrument.Sketch]], accumulate: int = 1) -> None:
    for step, gradients in enumerate(averaged_gradients(accumulate)):
        for name, gradient in gradients.items():
            sketch = history[step][f"Gradients/{name}"]
            assert sketch.count == gradient.numel()
            assert abs(sketch.l2 - gradient.norm().item()) <= 1e-5 * gradient.norm().item()


def test_first_rank_records_averaged_gradients_under_clean_names(pair: Pair, tmp_path: Path) -> None:
    """Watched by rank 0 after wrapping, DDP trains to the bit, and gradients are the averages over ranks."""
    first, second = pair.run(watch_in_ddp, str(tmp_path), "first", True, 1)
    assert first["same"]
    assert second["same"]
    assert_gradients(first["history"])
    assert set(first["sites"]) == {"Sequential", "0", "1", "2", "0.weight", "0.bias", "2.weight", "2.bias"}
    assert first["history"][0]["Activations/2"].count == 6 * 2, "the batch of rank 0 alone"
    assert first["notices"] == ()


def test_other_ranks_do_nothing(pair: Pair, tmp_path: Path) -> None:
    """Rank 1 has no hook, no site, no record and no file, and says why."""
    _, second = pair.run(watch_in_ddp, str(tmp_path), "first", True, 1)
    assert second["hooks"] == 0
    assert second["sites"] == []
    assert second["history"] == {}
    assert second["repr"] == "Watcher(off: rank 0 of 2 watches, this is rank 1)"
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1


def test_watching_before_wrapping_is_the_same(pair: Pair, tmp_path: Path) -> None:
    """A model that is watched first and wrapped then gives the same averaged gradients."""
    first, second = pair.run(watch_in_ddp, str(tmp_path), "first", False, 1)
    assert first["same"]
    assert second["same"]
    assert_gradients(first["history"])


def test_accumulation_without_synchronisation(pair: Pair, tmp_path: Path) -> None:
    """With no_sync on all but the last micro-batch, the gradient is the average of the accumulated sums."""
    first, second = pair.run(watch_in_ddp, str(tmp_path), "first", True, 3)
    assert first["same"]
    assert second["same"]
    assert_gradients(first["history"], 3)
    assert first["history"][0]["Activations/2"].count == 3 * 6 * 2


def watch_alone(rank: int, logdir: str) -> bool:
    bare = DistributedDataParallel(network())
    expected = train(bare, rank)
    model = DistributedDataParallel(network())
    if rank == 0:
        with instrument.watch(model, interval=1, logdir=logdir, strict=True) as watcher:
            losses = train(model, rank)
            assert len(watcher.history) == STEPS
    else:
        losses = train(model, rank)
    return losses == expected


def test_no_collective_is_issued_for_the_first_rank(pair: Pair, tmp_path: Path) -> None:
    """Rank 0 may watch where rank 1 runs no line of ours: a collective would have no partner."""
    assert pair.run(watch_alone, str(tmp_path)) == [True, True]


def test_merged_records_are_those_of_the_whole_batch(pair: Pair, tmp_path: Path) -> None:
    """Merged over ranks, activations are the sketch of both batches, and what is replicated counts once."""
    first, second = pair.run(watch_in_ddp, str(tmp_path), "merge", True, 1)
    assert first["same"]
    assert second["same"]
    assert_gradients(first["history"])
    assert first["history"].keys() == second["history"].keys() == set(range(STEPS))
    model = network()
    whole = torch.cat([batch(rank, 0) for rank in range(WORLD)])
    outputs = {"0": model[0](whole), "1": model[:2](whole), "2": model(whole)}
    for name, output in outputs.items():
        merged, expected = first["history"][0][f"Activations/{name}"], instrument.measure(output)
        assert merged.codes.tolist() == expected.codes.tolist()
        assert merged.counts.tolist() == expected.counts.tolist()
        assert merged.count == expected.count
        # Of a batch by halves a product of matrices is rounded in another order on some processors.
        assert (merged.min, merged.max) == pytest.approx((expected.min, expected.max), rel=1e-6)
        assert merged.rms == pytest.approx(expected.rms, rel=1e-6)
    assert first["history"][0]["Parameters/0.weight"].count == 8 * 4
    assert first["history"] == second["history"], "every rank has the merged records"
    histograms, scalars = read_back(tmp_path)
    assert histograms["Gradients/0.weight"] == [0, 2, 4]
    assert list(scalars["Activations.rms/2"]) == list(range(STEPS))
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1, "rank 0 writes, no other"


def dead_on(rank: int, logdir: str) -> dict[str, Any]:
    """Of 8 units the last never fires on any rank; the one before fires on rank 1 alone."""
    model = network()
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight[6:] = 0.0
        linear.weight[6, 0] = 1.0
        linear.bias[6:] = -1.0
    wrapped = DistributedDataParallel(model)
    with instrument.watch(wrapped, ranks="merge", interval=2, scalar_interval=1, logdir=logdir, strict=True) as watcher:
        for step in range(UNIT_STEPS):
            inputs = batch(rank, step, 64)
            inputs[:, 0] = 2.0 if rank else -2.0
            wrapped(inputs).square().mean().backward()
            watcher.step()
    status = watcher.dead_units()["1"]
    told = [(finding.diagnostic, finding.site, finding.unit) for finding in watcher.findings()]
    return {"status": status, "told": told}


def test_a_unit_is_dead_only_where_it_is_on_every_rank(pair: Pair, tmp_path: Path) -> None:
    """Merged over ranks, units are judged by the samples of all, and every rank and the run say the same."""
    first, second = pair.run(dead_on, str(tmp_path))
    assert first == second
    assert list(first["status"].dead) == [7]
    read = UnitHistory.of_run(tmp_path)
    assert list(read.latest["1"].dead) == [7]


def test_each_rank_writes_a_run_of_its_own(pair: Pair, tmp_path: Path) -> None:
    """With "each", below the directory given there is one for each rank, with that rank's activations."""
    first, second = pair.run(watch_in_ddp, str(tmp_path), "each", True, 1)
    assert first["same"]
    assert second["same"]
    for rank, answer in enumerate((first, second)):
        output = network()(batch(rank, 0))
        _, scalars = read_back(tmp_path / f"rank{rank}")
        assert abs(scalars["Activations.rms/2"][0] - instrument.measure(output).rms) < 1e-6
        assert answer["history"][0]["Activations/2"].count == 6 * 2


def make_runs(rank: int, directory: str) -> str | None:
    os.environ["INSTRUMENT_CONFIG"] = ""
    config = {"runs_directory": directory}
    with instrument.watch(network(), ranks="each", interval=1, config=config, strict=True) as watcher:
        return watcher.logdir


def test_each_rank_takes_a_run_directory(pair: Pair, tmp_path: Path) -> None:
    """Without a directory given, ranks that start together never share a run."""
    logdirs = pair.run(make_runs, str(tmp_path))
    assert len(set(logdirs)) == WORLD
    assert all(Path(logdir).is_dir() for logdir in logdirs)
