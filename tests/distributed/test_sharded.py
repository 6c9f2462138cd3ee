"""FSDP2, FSDP1 and DTensor on two ranks: shards with their counts, or, merged, the sketch of the whole tensor."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import instrument
from tests.distributed.pair import WORLD, Pair
from tests.distributed.test_data_parallel import batch

STEPS = 3
RATE = 0.1
KINDS = ("activations", "parameters", "gradients", "updates")


def network() -> nn.Sequential:
    """Rows that two ranks share unevenly: 5 and 1, so that rank 1 has nothing of the last weight."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))


def shard(model: nn.Sequential, how: str) -> nn.Module:
    if how == "fsdp2":
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        return model
    policy = ModuleWrapPolicy({nn.Linear})
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=how.endswith("orig"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
    )


def train(model: nn.Module, rank: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(rank, step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole_gradients() -> list[dict[str, torch.Tensor]]:
    """The averaged gradients of each step, worked out in one process."""
    model, found = network(), []
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(WORLD):
            (model(batch(rank, step)).square().mean() / WORLD).backward()
        found.append({name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(RATE * parameter.grad)
    return found


def watch_sharded(rank: int, how: str, ranks: str, logdir: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        bare = shard(network(), how)
        expected = train(bare, rank)
        model = shard(network(), how)
    with pytest.warns(instrument.InstrumentWarning) if ranks == "first" and rank == 0 else warnings.catch_warnings():
        watcher = instrument.watch(model, ranks=ranks, kinds=KINDS, interval=1, logdir=logdir, strict=True)
        losses = train(model, rank)
        watcher.flush()
    pairs = zip(bare.parameters(), model.parameters(), strict=True)
    answer = {
        "same": losses == expected and all(torch.equal(local(a), local(b)) for a, b in pairs),
        "history": {record.step: dict(record) for record in watcher.history},
        "notices": watcher.notices,
        "local": {name: local(parameter).numel() for name, parameter in model.named_parameters()},
        "root": watcher.sites[0].name if watcher.sites else "",
    }
    watcher.close()
    return answer


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def assert_whole(history: dict[int, dict[str, instrument.Sketch]]) -> None:
    """Gradients and the parameters after each step are those of the one-process training, each value once."""
    parameters = {name: value.detach().double() for name, value in network().named_parameters()}
    for step, gradients in enumerate(whole_gradients()):
        for name, gradient in gradients.items():
            parameters[name] = parameters[name] - RATE * gradient
            for kind, truth in (
                ("Gradients", gradient), ("Parameters", parameters[name]), ("Updates", -RATE * gradient)
            ):  # fmt: skip
                sketch = history[step][f"{kind}/{name}"]
                assert sketch.count == truth.numel(), (kind, name)
                assert sketch.l2 == pytest.approx(truth.norm().item(), rel=1e-4, abs=1e-7), (kind, name)
                assert sketch.min == pytest.approx(truth.min().item(), rel=1e-4, abs=1e-6)
                assert sketch.max == pytest.approx(truth.max().item(), rel=1e-4, abs=1e-6)


def test_first_rank_sees_its_shards_and_says_so(pair: Pair, tmp_path: Path) -> None:
    """Under fully_shard rank 0 counts the elements of its shards, trains to the bit, and names the shards once."""
    first, second = pair.run(watch_sharded, "fsdp2", "first", str(tmp_path))
    assert first["same"]
    assert second["same"]
    for name, count in first["local"].items():
        assert first["history"][0][f"Gradients/{name}"].count == count
    assert first["local"]["0.weight"] == 3 * 4, "of five rows"
    assert first["root"] == "Sequential"
    assert [notice for notice in first["notices"] if "one shard of several" in notice] == [
        "values are those of one shard of several, rank 0's of 2, for 0.weight, 0.bias, 2.weight, 2.bias; "
        'watch(..., ranks="merge") sees all'
    ]
    assert second["history"] == {}


def test_merged_shards_are_the_whole_tensor(pair: Pair, tmp_path: Path) -> None:
    """Under fully_shard the merged record has each value once, though the shards are uneven and one is empty."""
    first, second = pair.run(watch_sharded, "fsdp2", "merge", str(tmp_path))
    assert first["same"]
    assert second["same"]
    assert second["local"]["2.weight"] == 0, "nothing of the last weight lies on rank 1"
    assert_whole(first["history"])
    assert first["history"][0]["Activations/2"].count == WORLD * 6
    assert first["notices"] == second["notices"] == ()


@pytest.mark.parametrize("how", ["fsdp1_orig", "fsdp1_flat"])
@pytest.mark.parametrize("ranks", ["first", "merge"])
def test_the_older_wrapper_is_safe(pair: Pair, tmp_path: Path, how: str, ranks: str) -> None:
    """FSDP1 trains to the bit while watched, with original and flat parameters; merged, each value counts once."""
    first, second = pair.run(watch_sharded, how, ranks, str(tmp_path))
    assert first["same"]
    assert second["same"]
    if ranks == "first":
        assert any("one shard of several" in notice for notice in first["notices"])
    elif how == "fsdp1_orig":
        assert_whole(first["history"])
    else:
        truth = whole_gradients()[0]
        for name in ("0", "2"):
            sketch = first["history"][0][f"Gradients/{name}._flat_param"]
            whole = torch.cat([truth[f"{name}.weight"].flatten(), truth[f"{name}.bias"]])
            assert sketch.count == whole.numel(), "padding is not counted"
            assert sketch.l2 == pytest.approx(whole.norm().item(), rel=1e-4)


def watch_and_convert(rank: int, logdir: str) -> bool:
    model = network()
    fully_shard(model)
    with instrument.watch(model, ranks="merge", interval=1, logdir=logdir, strict=True) as watcher:
        watched: dict[str, torch.Tensor] = dict(model.named_parameters())
        model.to(torch.float64)
        train(model.float(), rank)
        return len(watcher.history) == STEPS and all(isinstance(value, DTensor) for value in watched.values())


def test_a_watched_sharded_model_can_be_converted(pair: Pair, tmp_path: Path) -> None:
    """`.to(dtype)` works on a sharded model that is watched: nobody holds its parameters."""
    assert pair.run(watch_and_convert, str(tmp_path)) == [True, True]


class Placed(nn.Module):
    """Parameters that are placed by hand: one sharded, one copied to all ranks."""

    sharded: Any
    copied: Any
    plain: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (WORLD,))
        whole = torch.arange(20.0).reshape(5, 4)
        self.sharded = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        self.copied = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
        self.plain = nn.Parameter(torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> Any:
        return (self.sharded.to_local().sum() + self.copied.to_local().sum() + self.plain.sum()) * x


def watch_placed(rank: int, logdir: str) -> dict[str, int]:
    model = Placed()
    if rank == 1:
        with torch.no_grad():
            model.plain.add_(1.0)  # an expert of this rank's own: not a copy of what rank 0 has
    with instrument.watch(model, ranks="merge", kinds="parameters", interval=1, logdir=logdir, strict=True) as watcher:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return {tag: sketch.count for tag, sketch in watcher.history[0].items()}


def test_placements_say_what_is_counted(pair: Pair, tmp_path: Path) -> None:
    """Of a DTensor shards are added and copies count once; plain parameters that differ are added as they are."""
    first, second = pair.run(watch_placed, str(tmp_path))
    assert first == second == {"Parameters/sharded": 20, "Parameters/copied": 20, "Parameters/plain": 2 * 6}


def watch_partial_sums(rank: int, logdir: str) -> tuple[set[str], tuple[str, ...]]:
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    second = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    plan = {"0": ColwiseParallel(use_local_output=False), "2": second}
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)
    names = ["0", "2"]
    with (
        pytest.warns(instrument.InstrumentWarning, match="yet to add up"),
        instrument.watch(model, names, kinds="activations", ranks="merge", interval=1, logdir=logdir) as watcher,
    ):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.ones(3, 4)).full_tensor().square().mean().backward()
        optimizer.step()
        watcher.flush()
        assert watcher.history[0]["Activations/0"].count == 3 * 8, "both shards of the columns"
        return set(watcher.history[0]), watcher.notices


def test_partial_sums_are_said_and_not_taken_for_values(pair: Pair, tmp_path: Path) -> None:
    """Under tensor parallelism shards of outputs are added up; a sum that the ranks have yet to make is left out."""
    for tags, notices in pair.run(watch_partial_sums, str(tmp_path)):
        assert tags == {"Activations/0"}
        assert [notice for notice in notices if "yet to add up" in notice] == [
            "activations of 2 are not measured: it is one of the sums that the ranks have yet to add up"
        ]


def count_reductions(rank: int, logdir: str) -> tuple[int, int]:
    from instrument.record.ranks import group

    counted: list[str] = []
    original = group.RankGroup.all_reduce

    @functools.wraps(original)
    def counting(self: Any, values: Any, operation: str) -> None:
        counted.append(operation)
        original(self, values, operation)

    group.RankGroup.all_reduce = counting  # type: ignore[method-assign]
    try:
        model = network()
        with instrument.watch(model, ranks="merge", interval=1, logdir=logdir, strict=True) as watcher:
            train(model, rank)
            watcher.flush()
            first = len(counted)
            train(model, rank)
            watcher.flush()
            return first, len(counted) - first
    finally:
        group.RankGroup.all_reduce = original  # type: ignore[method-assign]


def test_one_reduction_a_kind_and_flush(pair: Pair, tmp_path: Path) -> None:
    """Once the ranks know their tags, a flush is one all-reduce of maxima and one of sums, for any number of sites."""
    (_, later), _ = pair.run(count_reductions, str(tmp_path))
    assert later == 2 * STEPS
