"""Compiled models: by default not a graph, break or recompilation more, and the same numbers; else everything seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import instrument
from instrument.config import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::instrument.InstrumentWarning"),
    # Dynamo itself reads .grad of what goes into a compiled block.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
BACKENDS = ["eager", "aot_eager", "inductor"]


class Block(nn.Module):
    """A block with a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the layers make of it."""
        out: torch.Tensor = x + self.act(self.fc(x))
        return out


class Net(nn.Module):
    """A model of a class of its own; a `Sequential` behaves differently as root of a compiled call."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks."""
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.out(x)
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own class": Net,
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 8), Block(), nn.Linear(8, 2)),
}
HOWS = ["compile", "in place", "blocks", "blocks in place", "function"]
WHENS = ["before", "after", "after, the compiled one", "late", "late, the compiled one"]


class Outcome(NamedTuple):
    """What a training with a compiled model gave."""

    losses: list[float]
    parameters: list[torch.Tensor]
    graphs: int
    breaks: int
    records: tuple[instrument.StepRecord, ...]
    notices: tuple[str, ...]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_as(how: str, model: nn.Module, backend: str) -> Any:
    """The model compiled in one of the ways that people use, always with `fullgraph=True`."""
    if how == "compile":
        return torch.compile(model, backend=backend, fullgraph=True)
    if how == "function":
        return torch.compile(lambda x: model(x), backend=backend, fullgraph=True)
    if how == "in place":
        model.compile(backend=backend, fullgraph=True)
        return model
    for name, block in list(model.named_modules()):
        if isinstance(block, Block):
            if how == "blocks":
                parent, _, child = name.rpartition(".")
                wrapped: Any = torch.compile(block, backend=backend, fullgraph=True)
                model.get_submodule(parent)._modules[child] = wrapped
            else:
                block.compile(backend=backend, fullgraph=True)
    return model


def train(
    make: Callable[[], nn.Module],
    how: str,
    backend: str,
    when: str | None,
    logdir: Path,
    compiled: str = "outside",
    evaluates: bool = False,
) -> Outcome:
    """Six steps, every second one sampled where there is a watch, each with an evaluation before it if asked for."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    watcher = None

    def watch(target: nn.Module) -> instrument.Watcher:
        return instrument.watch(target, kinds=KINDS, interval=2, logdir=logdir, compiled=compiled, strict=True)

    if when == "before":
        watcher = watch(model)
    step_function = compiled_as(how, model, backend)
    if when == "after":
        watcher = watch(model)
    if when == "after, the compiled one":
        watcher = watch(step_function)
    losses = []
    for step in range(6):
        if step == 2 and when == "late":
            watcher = watch(model)
        if step == 2 and when == "late, the compiled one":
            watcher = watch(step_function)
        if evaluates:
            model.eval()
            with torch.no_grad():
                losses.append(step_function(torch.ones(5, 4)).sum().item())
            model.train()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = step_function(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    records = watcher.history if watcher is not None else ()
    notices = watcher.notices if watcher is not None else ()
    if watcher is not None:
        watcher.close()
    return Outcome(losses, [p.detach().clone() for p in model.parameters()], graphs, breaks, records, notices)


def _cases() -> Iterator[tuple[str, str, str]]:
    for model in MODELS:
        for how in HOWS:
            if model == "Sequential" and "blocks" in how:
                continue
            for when in WHENS:
                if not (how == "function" and "compiled one" in when):
                    yield model, how, when


CASES = list(_cases())


def names(record: instrument.StepRecord, section: str) -> set[str]:
    return {tag.split("/", 1)[1] for tag in record if tag.startswith(section + "/")}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("model", "how", "when"), CASES)
def test_outside_changes_nothing_and_parameters_are_complete(
    model: str, how: str, when: str, backend: str, tmp_path: Path
) -> None:
    """By default: the same numbers, no graph, break or recompilation more, and every parameter and gradient."""
    make = MODELS[model]
    bare, watched = (train(make, how, backend, w, tmp_path) for w in (None, when))
    assert watched.losses == bare.losses
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters, bare.parameters, strict=True))
    assert (watched.graphs, watched.breaks) == (bare.graphs, bare.breaks)
    expected = {name for name, _ in make().named_parameters()}
    assert names(watched.records[-1], "Parameters") == expected
    assert names(watched.records[-1], "Gradients") == expected
    assert len(watched.notices) == 1  # what is inside, or what came too late, is said once
    assert "torch.compile" in watched.notices[0] or "compiled before the watch began" in watched.notices[0]


@pytest.mark.parametrize(("how", "when"), [("compile", "before"), ("blocks", "after"), ("function", "before")])
def test_outside_changes_nothing_with_inductor(how: str, when: str, tmp_path: Path) -> None:
    """The same holds for the real compiler."""
    bare, watched = (train(Net, how, "inductor", w, tmp_path) for w in (None, when))
    assert watched.losses == bare.losses
    assert (watched.graphs, watched.breaks) == (bare.graphs, bare.breaks)


@pytest.mark.parametrize("how", ["blocks", "blocks in place"])
def test_compiled_blocks_are_seen_from_outside(how: str, tmp_path: Path) -> None:
    """Where blocks are compiled one by one, their own outputs and gradients are recorded, and their insides named."""
    outcome = train(Net, how, "aot_eager", "after", tmp_path)
    record = outcome.records[-1]
    assert names(record, "Activations") == {"Net", "inp", "blocks.0", "blocks.1", "out"}
    assert names(record, "ActivationGradients") == {"Net", "inp", "blocks.0", "blocks.1", "out"}
    assert record["Activations/blocks.1"].count == 5 * 8
    assert "inside a region of torch.compile, so without activations: blocks.0.fc, blocks.0.act" in outcome.notices[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("how", "when"), [("compile", "before"), ("in place", "after"), ("function", "before")])
def test_graph_records_everything_in_exactly_two_graphs(how: str, when: str, backend: str, tmp_path: Path) -> None:
    """`compiled="graph"`: all activations and gradients from inside, two graphs, no break, the eager values."""
    outcome = train(Net, how, backend, when, tmp_path, compiled="graph")
    bare = train(Net, how, backend, None, tmp_path)
    assert (outcome.graphs, outcome.breaks, outcome.notices) == (2, 0, ())
    assert outcome.losses == pytest.approx(bare.losses, rel=1e-6)
    truth = train(Net, "compile", "eager", "before", tmp_path, compiled="eager")
    assert [record.step for record in outcome.records] == [0, 2, 4]
    for record, expected in zip(outcome.records, truth.records, strict=True):
        assert set(record) == set(expected)
        for tag, sketch in record.items():
            assert sketch.count == expected[tag].count
            assert sketch.l2 == pytest.approx(expected[tag].l2, rel=1e-5)


class Deep(Net):
    """More blocks than Dynamo compiles one piece of code for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(torch._dynamo.config.recompile_limit + 2)])


@pytest.mark.parametrize("how", ["blocks", "blocks in place"])
def test_blocks_share_two_graphs_however_many_they_are(how: str, tmp_path: Path) -> None:
    """With `compiled="graph"` ten blocks that shared one graph share two: no limit ends the training, all is seen."""
    outcome = train(Deep, how, "aot_eager", "before", tmp_path, compiled="graph")
    bare = train(Deep, how, "aot_eager", None, tmp_path)
    assert (bare.graphs, outcome.graphs, outcome.breaks, outcome.notices) == (1, 2, 0, ())
    assert outcome.losses == pytest.approx(bare.losses, rel=1e-6)
    truth = train(Deep, "compile", "eager", "before", tmp_path, compiled="eager")
    assert names(truth.records[0], "Activations") >= {"blocks.0.act", "blocks.9.act"}
    for record, expected in zip(outcome.records, truth.records, strict=True):
        assert set(record) == set(expected)
        for tag, sketch in record.items():
            assert sketch.count == expected[tag].count
            assert sketch.l2 == pytest.approx(expected[tag].l2, rel=1e-5)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("compiled", "more"), [("outside", 0), ("graph", 1), ("eager", 0)])
def test_evaluation_between_steps_costs_no_graph_and_no_error(
    compiled: str, more: int, how: str, tmp_path: Path
) -> None:
    """A loop that evaluates before each step trains the same in each mode, with the graphs it had and no error."""
    bare = train(Net, how, "eager", None, tmp_path, evaluates=True)
    watched = train(Net, how, "eager", "before", tmp_path, compiled, evaluates=True)
    assert watched.losses == bare.losses
    assert (bare.graphs, watched.graphs, watched.breaks) == (2, 2 + more, 0)
    assert [record.step for record in watched.records] == [0, 2, 4]
    expected = {
        "outside": 0 if how == "function" else 5 * 2,  # of the root, where no function is around it
        "graph": 5 * 2,
        "eager": 5 * 2,
    }[compiled]
    found = [record["Activations/Net"].count if "Activations/Net" in record else 0 for record in watched.records]
    assert found == [expected] * 3
    inside = {"outside": how in ("blocks", "blocks in place"), "graph": True, "eager": True}[compiled]
    assert all(("Activations/blocks.0" in record) == inside for record in watched.records)
    assert stance() == "default"


@pytest.mark.parametrize("how", ["compile", "blocks"])
def test_graph_measures_parts_that_are_frozen_in_evaluation_mode(how: str, tmp_path: Path) -> None:
    """A part in evaluation mode counts in training passes, and in no evaluation of the model, even with gradients."""
    model = Net()
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, compiled="graph", strict=True)
    forward = compiled_as(how, model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        model.eval()
        forward(torch.randn(5, 4))
        with torch.no_grad():
            forward(torch.randn(5, 4))
        model.train()
        model.blocks[0].eval()
        forward(torch.randn(5, 4)).mean().backward()
        optimizer.step()
    watcher.close()
    counts = [(r["Activations/blocks.0.fc"].count, r["Activations/blocks.1.fc"].count) for r in watcher.history]
    assert counts == [(5 * 8, 5 * 8)] * 4
    assert watcher.notices == ()


def test_graph_of_a_model_that_trains_in_evaluation_mode_says_why_it_is_empty(tmp_path: Path) -> None:
    """Inside a graph the mode alone tells a training from an evaluation: what lacks then is said, with the cause."""
    model = Net().eval()
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, compiled="graph", strict=True)
    forward = compiled_as("compile", model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        forward(torch.randn(5, 4)).mean().backward()
        optimizer.step()
    watcher.close()
    assert names(watcher.history[-1], "Activations") == set()
    assert names(watcher.history[-1], "Gradients") == {name for name, _ in model.named_parameters()}
    assert 'with compiled="graph" a model in evaluation mode does' in watcher.notices[0]


def test_graph_follows_outputs_of_several_tensors(tmp_path: Path) -> None:
    """Inside the graph too, dictionaries and tuples have each tensor under its name."""

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"left": x * 2, "right": (x.sin(), None)}

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.two = Two()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.two(self.fc(x))
            out: torch.Tensor = parts["left"] + parts["right"][0]
            return out

    outcome = train(Holder, "compile", "aot_eager", "before", tmp_path, compiled="graph")
    assert {"two[left]", "two[right][0]"} <= names(outcome.records[-1], "Activations")
    assert {"two[left]", "two[right][0]"} <= names(outcome.records[-1], "ActivationGradients")
    assert (outcome.graphs, outcome.breaks) == (2, 0)


def test_graph_that_comes_too_late_says_so(tmp_path: Path) -> None:
    """Hooks put on after the first compiled call are ignored by the graph: that is said, never silent."""
    outcome = train(Net, "compile", "eager", "late", tmp_path, compiled="graph")
    assert "compiled before the watch began" in outcome.notices[0]
    assert names(outcome.records[-1], "Gradients") == {name for name, _ in Net().named_parameters()}


@pytest.mark.parametrize(("model", "how", "when"), CASES)
def test_eager_records_everything_in_one_graph(model: str, how: str, when: str, tmp_path: Path) -> None:
    """`compiled="eager"`: sampled steps run uncompiled and see all, others are compiled once, the stance comes back."""
    make = MODELS[model]
    outcome = train(make, how, "eager", when, tmp_path, compiled="eager")
    bare = train(make, how, "eager", None, tmp_path)
    assert outcome.losses == bare.losses
    assert (outcome.graphs, outcome.breaks, outcome.notices) == (bare.graphs, bare.breaks, ())
    callable_modules = {
        name or type(make()).__name__ for name, m in make().named_modules() if not isinstance(m, nn.ModuleList)
    }
    assert names(outcome.records[-1], "Activations") == callable_modules
    assert names(outcome.records[-1], "ActivationGradients") == callable_modules
    assert stance() == "default"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["compile", "blocks", "function"])
def test_eager_records_everything_with_every_compiler(how: str, backend: str, tmp_path: Path) -> None:
    """`compiled="eager"` with a compiler that computes for itself: all is seen, in the graphs that were there."""
    outcome = train(Net, how, backend, "before", tmp_path, compiled="eager")
    bare = train(Net, how, backend, None, tmp_path)
    truth = train(Net, how, "eager", "before", tmp_path, compiled="eager")
    assert outcome.losses == pytest.approx(bare.losses, rel=1e-5)
    assert (outcome.graphs, outcome.breaks, outcome.notices) == (bare.graphs, bare.breaks, ())
    for record, expected in zip(outcome.records, truth.records, strict=True):
        assert {tag: sketch.count for tag, sketch in record.items()} == {
            tag: sketch.count for tag, sketch in expected.items()
        }
        assert record["ActivationGradients/blocks.0.fc"].l2 == pytest.approx(
            expected["ActivationGradients/blocks.0.fc"].l2, rel=1e-4
        )
    assert stance() == "default"


def stance() -> str:
    from torch._dynamo import eval_frame

    name: str = eval_frame._stance.stance
    return name


class Failing(Net):
    """Raises at each call until it is mended."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error: type[BaseException] | None = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt, SystemExit])
def test_the_stance_is_restored_when_an_exception_leaves_the_model(error: type[BaseException], tmp_path: Path) -> None:
    """An exception in a sampled forward puts the stance back at once; the next forward is sampled all the same."""
    model = Failing(error)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(compiled, interval=1, logdir=tmp_path, compiled="eager", strict=True)
    with pytest.raises(error):
        compiled(torch.randn(5, 4))
    assert stance() == "default"
    model.error = None
    compiled(torch.randn(5, 4)).mean().backward()
    optimizer.step()
    assert watcher.history[-1]["Activations/blocks.0.fc"].count == 5 * 8
    watcher.close()
    assert stance() == "default"


@pytest.mark.parametrize("how", ["compile", "function", "blocks"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_an_exception_takes_from_a_sampled_step_is_said(
    error: type[BaseException], how: str, tmp_path: Path
) -> None:
    """After an exception in a step that ran uncompiled, either its activations are there or a notice says they lack."""
    torch._dynamo.reset()
    model = Failing(error)
    model.error = None
    forward = compiled_as(how, model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with instrument.watch(model, interval=2, logdir=tmp_path, compiled="eager", strict=True) as watcher:
        for step in range(5):
            if step == 2:
                model.error = error
                with pytest.raises(error):
                    forward(torch.randn(5, 4))
                model.error = None
                assert stance() == "default"
            forward(torch.randn(5, 4)).mean().backward()
            optimizer.step()
        records = list(watcher.history)
    assert [record.step for record in records] == [0, 2, 4]
    inside = ["Activations/blocks.0.fc" in record for record in records]
    is_whole = how == "blocks"  # where the root is not compiled, its next call is uncompiled again
    assert inside == [True, is_whole, True]
    told = [notice for notice in watcher.notices if "an exception left the model in step 2" in notice]
    assert len(told) == (not is_whole)


@pytest.mark.parametrize("how", ["compile", "function", "blocks"])
def test_an_interrupt_that_is_held_keeps_the_stance_until_it_is_let_go(how: str, tmp_path: Path) -> None:
    """Torch tells no hook of Ctrl-C: the stance comes back with the end of its traceback, or of the watch before it."""
    for closes_first in (False, True):
        torch._dynamo.reset()
        model = Failing(KeyboardInterrupt)
        watcher = instrument.watch(model, interval=2, logdir=tmp_path, compiled="eager", strict=True)
        try:
            compiled_as(how, model, "eager")(torch.randn(5, 4))
        except KeyboardInterrupt:
            assert stance() == "force_eager"
            if closes_first:
                watcher.close()
                assert stance() == "default"
                torch.compiler.set_stance("eager_on_recompile")
        assert stance() == ("eager_on_recompile" if closes_first else "default")
        torch.compiler.set_stance("default")
        watcher.close()


def test_closing_restores_the_stance(tmp_path: Path) -> None:
    """A watch that is closed in the middle of a sampled step leaves the stance as it was before."""
    model = Net()
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, compiled="eager", strict=True)
    assert stance() == "force_eager"
    watcher.close()
    assert stance() == "default"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_optimizer_step_recompiles_for_nothing_of_ours(backend: str, tmp_path: Path) -> None:
    """With `torch.compile(optimizer.step)` steps and gradients are right, and counting recompiles nothing."""

    def run(watched: bool) -> tuple[int, list[float]]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
        step_function = torch.compile(optimizer.step, backend=backend)
        watcher = instrument.watch(model, interval=2, logdir=tmp_path, strict=True) if watched else None
        losses = []
        for step in range(30):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            step_function()
            losses.append(loss.item())
        if watcher is not None:
            assert watcher.current_step == 30
            assert names(watcher.history[-1], "Gradients") == {name for name, _ in model.named_parameters()}
            watcher.close()
        return counters["stats"]["unique_graphs"], losses

    bare, watched = run(watched=False), run(watched=True)
    assert watched == bare


def test_thirty_steps_recompile_nothing(tmp_path: Path) -> None:
    """The state of hooks changes from step to step without one recompilation in thirty."""
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watcher = instrument.watch(model, interval=3, logdir=tmp_path, strict=True)
    for _ in range(30):
        optimizer.zero_grad()
        compiled(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert watcher.current_step == 30
    watcher.close()
