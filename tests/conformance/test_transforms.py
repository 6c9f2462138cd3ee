"""Watched models under the transforms of torch: func, export, trace, script, modes, replicas, threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import instrument
from instrument.config import KINDS

from .harness import data, of_kind


@pytest.fixture
def watched(tmp_path: Path) -> Any:
    """A model in the middle of a sampled step: hooks of every kind stand on it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
    model(data(0)).square().mean().backward()
    assert model[0]._forward_hooks
    yield model, watcher
    watcher.close()


def finish(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_functional_transforms_work_and_are_not_recorded(watched: Any) -> None:
    """`vmap`, `grad`, `jvp` and `functional_call` give their results, and nothing of them is recorded or leaks."""
    model, watcher = watched
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(model, values, (x,)).square().mean()
        return out

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, data(1)[:, None])
    assert per_sample["0.weight"].shape == (6, 8, 4)
    jvp(lambda x: model(x), (data(1),), (torch.ones(6, 4),))
    finish(model)
    assert watcher.history[-1]["Activations/0"].count == 6 * 8
    assert watcher.notices == ()


def test_flops_are_counted_as_without(watched: Any) -> None:
    """A flop counter sees the model's operations and none of ours; a profiler does no harm."""
    model, watcher = watched
    with FlopCounterMode(display=False) as counter, torch.profiler.profile():
        model(data(1)).sum().backward()
    forward = 2 * 6 * (4 * 8 + 8 * 2)
    assert counter.get_total_flops() == forward + 2 * forward - 2 * 6 * 4 * 8  # no gradient of the input
    finish(model)
    assert watcher.history[-1]["Activations/0"].count == 2 * 48


def test_fake_tensors_pass_through(tmp_path: Path) -> None:
    """A memory estimate with fake tensors runs on a watched model, is told apart, and training goes on after it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3))
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    with pytest.warns(instrument.InstrumentWarning, match="fake tensor"), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(6, 4)).sum()
    model(data(0)).mean().backward()
    finish(model)
    assert watcher.history[-1]["Activations/0"].count == 18
    watcher.close()


def test_tracing_bakes_nothing_of_ours_in(watched: Any) -> None:
    """`torch.jit.trace` of a model in the middle of a sampled step gives the graph that it gives without a watch."""
    model, watcher = watched
    traced = torch.jit.trace(model, data(1))
    assert torch.equal(traced(data(2)), model(data(2)))
    instrument.unwatch(model)
    assert str(torch.jit.trace(model, data(1)).inlined_graph).count("aten::") == str(traced.inlined_graph).count(
        "aten::"
    )
    assert watcher.notices == ()


def test_scripting_works_between_sampled_steps_and_after(tmp_path: Path) -> None:
    """`torch.jit.script` refuses hooks of Python; between sampled steps and after `unwatch` there are none."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    instrument.watch(model, interval=10, logdir=tmp_path, strict=True, config={"scalar_interval": 10})
    for step in range(3):
        optimizer.zero_grad()
        model(data(step)).mean().backward()
        optimizer.step()
    assert torch.equal(torch.jit.script(model)(data(5)), model(data(5)))
    instrument.unwatch(model)
    assert torch.equal(torch.jit.script(model)(data(5)), model(data(5)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_watched_model_is_the_export_of_a_bare_one(strict: bool, watched: Any) -> None:
    """`torch.export` in the middle of a sampled step gives the graph that it gives without a watch."""
    model, _ = watched
    exported = torch.export.export(model, (data(1),), strict=strict)
    instrument.unwatch(model)
    bare = torch.export.export(model, (data(1),), strict=strict)
    assert [node.target for node in exported.graph.nodes] == [node.target for node in bare.graph.nodes]
    assert torch.equal(exported.module()(data(2)), model(data(2)))


def test_script_modules_are_watched_by_their_parameters(tmp_path: Path) -> None:
    """A scripted model, which takes no hooks of ours, trains; its parameters and gradients are recorded."""
    torch.manual_seed(3)
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(instrument.InstrumentWarning):
        watcher = instrument.watch(model, interval=1, logdir=tmp_path)
        for step in range(3):
            optimizer.zero_grad()
            model(data(step)).mean().backward()
            optimizer.step()
        watcher.flush()
    assert set(of_kind(watcher.history[-1], "Gradients")) == {"0.weight", "0.bias"}
    assert watcher.current_step == 3
    assert watcher.notices
    watcher.close()


def test_replicas_of_data_parallel_are_not_recorded(watched: Any) -> None:
    """A replica shares the hooks of its original; what it computes, in whatever thread, is none of ours."""
    model, watcher = watched
    replica = model._replicate_for_data_parallel()
    replica(data(1))
    finish(model)
    assert watcher.history[-1]["Activations/Sequential"].count == 12


def test_evaluation_in_another_thread_is_not_recorded(watched: Any) -> None:
    """A `no_grad` evaluation in a thread of its own is not recorded while the main thread trains."""
    model, watcher = watched

    def evaluate() -> None:
        with torch.no_grad():
            for _ in range(20):
                model(data(1))

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        model(data(2)).square().mean().backward()
    for thread in threads:
        thread.join()
    finish(model)
    assert watcher.history[-1]["ActivationGradients/0"].count == 6 * 48
    assert watcher.history[-1]["Activations/0"].count == 6 * 48


def test_several_models_train_in_threads_of_their_own(tmp_path: Path) -> None:
    """Four models, each watched and trained in its own thread, have their own steps and values."""
    results: dict[int, tuple[int, list[int]]] = {}

    def train(number: int) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with instrument.watch(model, interval=1, logdir=tmp_path / str(number), strict=True) as watcher:
            for step in range(10 + number):
                optimizer.zero_grad()
                model(data(step, size=2 + number)).mean().backward()
                optimizer.step()
            counts = [record["Activations/0"].count for record in watcher.history]
            results[number] = watcher.current_step, counts

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert results[number] == (10 + number, [(2 + number) * 3] * (10 + number))
