"""With any private name of torch missing, training stays the same, and what the table of stand-ins says happens.

The library is imported inside of functions only: those called `without_...` run in processes in which it finds
names missing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.without import PROJECT, Nursery

SHIM = PROJECT / "instrument" / "torch_private.py"
GRAPH_TASK = "torch._C._current_graph_task_id"
FUNCTORCH = "torch._C._functorch.peek_interpreter_stack"
DISABLE_MODES = "torch.utils._python_dispatch._disable_current_modes"
FUNCTION_MODES = "torch._C._len_torch_function_stack"
COUNT_MODES = "torch._C._len_torch_dispatch_stack"
SET_GRAD = "torch._C._set_grad_enabled"
DISABLE_FUNCTION = "torch._C.DisableTorchFunction"
FRAMES = "torch._C._dynamo.eval_frame."
CODE_STRATEGY = [FRAMES + name for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")]
IS_FAKE = "torch._subclasses.fake_tensor.is_fake"
FLATTEN = "torch._C._nn.flatten_dense_tensors"
MEETING_STORE = "torch.distributed.distributed_c10d._get_default_store"
STEP_WRAPPER = "torch.optim.Optimizer.profile_hook_step"
SCALER_STEP = "torch.amp.GradScaler.step"
MODULE_CALL = "torch.nn.Module._call_impl"
COMPILED_CALL = FRAMES + "get_eval_frame_callback"
ENGINE = "torch.autograd.Variable._execution_engine"
VERSION = "torch.Tensor._version"
HOOK_LISTS = ["torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    found = Nursery()
    yield found
    found.close()


class Checkpointed(nn.Module):
    """A part that is computed again in backward, with random numbers, under selective or reentrant checkpointing."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant:
            again: torch.Tensor = checkpoint(self._part, self.a(x), use_reentrant=True)
            return again
        saved = [torch.ops.aten.sum.default, torch.ops.aten.bincount.default, torch.ops.aten.addmm.default]

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731  # checkpoint wants a callable
        out: torch.Tensor = checkpoint(self._part, self.a(x), use_reentrant=False, context_fn=contexts)
        return out

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.b(x.sigmoid()))
        return out


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 2))


def records_of(make: Callable[[], nn.Module], **arguments: Any) -> tuple[list[Any], tuple[str, ...]]:
    """Records and notices of a training that is compared with its twin bit by bit."""
    from tests.conformance.harness import twins

    found = twins(make, Path("run"), **arguments)
    return list(found.records), found.notices


def counts(record: Any, section: str) -> dict[str, int]:
    from tests.conformance.harness import of_kind

    return {name: sketch.count for name, sketch in of_kind(record, section).items()}


def without_nothing() -> None:
    """With nothing missing: four elements of six rows each, once."""
    for use_reentrant in (False, True):
        records, notices = records_of(partial(Checkpointed, use_reentrant))
        assert counts(records[-1], "Activations") == {"Checkpointed": 24, "a": 24, "b": 24, "drop": 24}
        assert notices == ()


def without_graph_task() -> None:
    """Recomputations are not known: reentrant ones count twice, of others nothing is kept; nothing is changed."""
    records, _ = records_of(Checkpointed)
    assert counts(records[-1], "Activations") == {"Checkpointed": 24, "a": 24, "b": 24, "drop": 24}
    records, notices = records_of(partial(Checkpointed, use_reentrant=True))
    assert counts(records[-1], "Activations") == {"Checkpointed": 24, "a": 24, "b": 48, "drop": 48}
    assert counts(records[-1], "Gradients") == {"a.weight": 16, "a.bias": 4, "b.weight": 16, "b.bias": 4}
    assert notices == ()


def _vmapped(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    from tests.conformance.harness import data

    optimizer.zero_grad()
    loss: torch.Tensor = torch.func.vmap(model)(data(step)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def without_functorch() -> None:
    """Transforms are not known: what cannot be measured in them is said once, and the rest is recorded."""
    records, notices = records_of(lambda: nn.Sequential(nn.Linear(4, 2)), step=_vmapped, strict=False)
    assert [len(counts(record, "Gradients")) for record in records] == [2, 2, 2, 2]
    assert counts(records[-1], "Activations") == {}
    assert notices
    assert len(set(notices)) == len(notices)


class Counting(TorchDispatchMode):
    """Counts the operations that it sees."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def _sketches_under_a_mode() -> tuple[int, dict[str, int], tuple[str, ...]]:
    """Operations that a mode around the forward sees, activations by count, and notices; both twins agree."""
    from tests.conformance.harness import data

    seen: list[int] = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
        optimizer.zero_grad()
        with Counting() as mode:  # type: ignore[no-untyped-call]
            loss: torch.Tensor = model(data(number)).square().mean()
        seen.append(mode.seen)
        loss.backward()
        optimizer.step()
        return loss

    records, notices = records_of(plain, step=step)
    assert len(set(seen)) == 1  # watched or not, the mode sees the same
    assert len(counts(records[-1], "Parameters")) == len(counts(records[-1], "Gradients")) == 4
    return seen[0], counts(records[-1], "Activations"), notices


def without_a_way_out_of_modes() -> None:
    """Under a mode nothing is measured and that is said; selective checkpointing goes on unharmed."""
    _, activations, notices = _sketches_under_a_mode()
    assert activations == {}
    assert all("a dispatch mode is active" in notice for notice in notices)
    assert len(notices) == len(set(notices)) == 5
    records, notices = records_of(Checkpointed)
    assert counts(records[-1], "Activations") == {"Checkpointed": 24, "a": 24}  # no mode is active there
    assert len(counts(records[-1], "Gradients")) == 4
    assert {notice.split(" are ")[0] for notice in notices} == {"activations of b", "activations of drop"}


def without_a_count_of_modes() -> None:
    """Modes are switched off unasked: all is measured, and no mode sees it."""
    _, activations, notices = _sketches_under_a_mode()
    assert activations == {"Sequential": 12, "0": 24, "1": 24, "2": 24, "3": 12}
    assert notices == ()
    without_nothing()


def without_either() -> None:
    """Neither known nor hidden: nothing is measured at all, and that is said."""
    from instrument.errors import UnmeasurableError
    from instrument.measure.custom_op import measure

    records, notices = records_of(plain)
    assert all(len(record) == 0 for record in records)
    assert any(notice.startswith("gradients of 0.weight are not measured: a dispatch mode") for notice in notices)
    with pytest.raises(UnmeasurableError, match="dispatch mode"):
        measure(torch.ones(2))


def without_set_grad() -> None:
    """The public switch does the same."""
    from instrument.torch_private import Unseen

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            with Unseen():
                assert not torch.is_grad_enabled()
            assert torch.is_grad_enabled() is mode
    without_nothing()


class Nosy(TorchFunctionMode):
    """A mode that notes what is called, such as `torch.set_default_device` is one."""

    seen: tuple[str, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = (*self.seen, str(getattr(func, "__name__", func)))
        return func(*args, **(kwargs or {}))


def _seen_by_a_function_mode() -> tuple[str, ...]:
    import instrument

    values = torch.arange(1.0, 5.0)
    with Nosy() as mode:
        sketch = instrument.measure(values)
    assert (sketch.count, sketch.mean, sketch.max) == (4, 2.5, 4.0)
    seen: tuple[str, ...] = mode.seen
    return seen


def with_disable_function() -> None:
    """Ordinarily a function mode sees nothing of what we do."""
    assert _seen_by_a_function_mode() == ()


def without_disable_function() -> None:
    """Function modes see our operations, whose values are right all the same."""
    assert "numel" in _seen_by_a_function_mode()
    without_nothing()


def without_code_strategy() -> None:
    """Dynamo is kept away by its public means; compiled models train the same, and steps are counted."""
    from tests.test_compile import Net, names, train

    without_nothing()
    for how in ("compile", "blocks"):
        bare, watched = (train(Net, how, "eager", when, Path("run")) for when in (None, "after"))
        assert watched.losses == bare.losses
        assert [record.step for record in watched.records] == [0, 2, 4]
        assert names(watched.records[-1], "Gradients") == {name for name, _ in Net().named_parameters()}


def without_is_fake() -> None:
    """Fake tensors are known by the name of their class."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from instrument.errors import UnmeasurableError
    from instrument.measure.custom_op import measure

    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(UnmeasurableError, match="fake"):
        measure(fake)
    assert measure(torch.ones(3)).count == 3
    without_nothing()


def without_flatten() -> None:
    """Many small tensors in one row are made flat one by one, and measured as they are alone."""
    from instrument.measure.batch import measure_later
    from instrument.measure.custom_op import measure
    from instrument.measure.groups import Later
    from instrument.torch_private import flattened

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, size, generator=generator) for size in range(1, 9)]
    assert torch.equal(flattened(tensors), torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, later in zip(tensors, measure_later(tensors), strict=True):
        assert isinstance(later, Later)
        found, alone = later.sketch(), measure(tensor)
        assert (found.codes.tolist(), found.high) == (alone.codes.tolist(), alone.high)
    without_nothing()


class Twice(torch.optim.SGD):
    """A subclass that calls `super().step()` and changes the parameters once more."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)
        return loss


def _nested_step() -> bool:
    """Whether what a subclass does after `super().step()` is in the recorded parameters; steps are right."""
    import instrument
    from tests.conformance.harness import twins

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        torch.optim.SGD(model.parameters())  # torch puts its hooks into the `step` of a class at its first instance
        return Twice(model.parameters(), lr=0.1)

    found = twins(plain, Path("run"), optimizer=optimizer)
    assert [record.step for record in found.records] == [0, 1, 2, 3]
    final = instrument.measure(found.state["0.weight"]).l2
    return bool(found.records[-1]["Parameters/0.weight"].l2 == final)


def with_step_wrapper() -> None:
    """Ordinarily the outermost step counts."""
    assert _nested_step()


def without_step_wrapper() -> None:
    """The innermost step counts, so what follows it is not in the parameters; steps are counted once."""
    assert not _nested_step()


def _scaled_by() -> float:
    """Recorded gradients of an activation, over the true ones."""
    import instrument

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watcher = instrument.watch(model, kinds=["activation_gradients", "gradients"], interval=1, logdir="run")
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    scaler.step(optimizer)
    watcher.close()
    (record,) = watcher.history
    assert record["Gradients/bias"].max == 2.0  # one for each of the two rows
    return float(record["ActivationGradients/Linear"].max)


def with_scaler_step() -> None:
    """Ordinarily gradients of activations are divided by the scale."""
    assert _scaled_by() == 1.0


def without_scaler_step() -> None:
    """They stay multiplied by it."""
    assert _scaled_by() == 1024.0


def without_compiled_call() -> None:
    """Compiled calls are not known from inside: hooks may cost one graph more, and change no number."""
    from tests.test_compile import Net, names, train

    for how in ("compile", "in place", "function", "blocks"):
        bare, watched = (train(Net, how, "eager", when, Path("run")) for when in (None, "before"))
        assert watched.losses == bare.losses
        assert watched.graphs - bare.graphs in (0, 1)
        assert watched.breaks == bare.breaks
        assert names(watched.records[-1], "Gradients") == {name for name, _ in Net().named_parameters()}


def without_version() -> None:
    """Steps without an optimizer are not seen, which is said; containers are measured as before."""
    import instrument

    records, notices = records_of(plain)
    assert counts(records[-1], "Activations") == {"Sequential": 12, "0": 24, "1": 24, "2": 24, "3": 12}
    assert notices == ()
    model = plain()
    watcher = instrument.watch(model, interval=1, logdir="hand")
    for _ in range(6):
        model(torch.randn(6, 4)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    assert watcher.current_step == 0
    assert any("call watcher.step()" in notice for notice in watcher.notices)
    watcher.close()


def hand_written_gradients() -> list[bool]:
    """Whether each step of a loop without an optimizer, which clears its gradients at once, has one; it is right."""
    import instrument

    model = plain()
    truth = []
    with instrument.watch(model, interval=1, logdir="hand", strict=True) as watcher:
        for _ in range(4):
            model(torch.randn(6, 4)).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)
            truth.append(model.get_parameter("0.weight").grad)
            model.zero_grad()
    assert watcher.current_step == 4
    for record, gradient in zip(watcher.history, truth, strict=True):
        if "Gradients/0.weight" in record:
            assert gradient is not None
            assert abs(record["Gradients/0.weight"].l2 - gradient.norm().item()) < 1e-6
    return ["Gradients/0.weight" in record for record in watcher.history]


def with_engine() -> None:
    """Ordinarily gradients are measured at the end of the backward pass where no optimizer is there to ask."""
    assert hand_written_gradients() == [True] * 4


def without_engine() -> None:
    """What such a loop clears by itself is not recorded."""
    assert hand_written_gradients() == [False] * 4


def without_the_method_of_the_writer() -> None:
    """Where torch asks another method for its file, all is written by ours all the same, as after a `close`."""
    import instrument
    from instrument.record.writer import SummaryWriter
    from tests.training import mlp, read_back, train

    torch_writer: Any = SummaryWriter.__mro__[1]
    renamed = torch_writer._get_file_writer
    torch_writer._another_name = renamed
    del torch_writer._get_file_writer
    for name, method in list(vars(torch_writer).items()):
        code = getattr(method, "__code__", None)
        if code is not None and "_get_file_writer" in code.co_names:
            names = tuple("_another_name" if n == "_get_file_writer" else n for n in code.co_names)
            method.__code__ = code.replace(co_names=names)
            assert getattr(torch_writer, name) is method
    model = mlp()
    watcher = instrument.watch(model, interval=1, logdir="run")
    watcher.writer.add_scalar("loss", 0.5, 1)
    assert type(watcher.writer.file_writer).__module__ == "instrument.record.writer"
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    watcher.close()
    histograms, scalars = read_back("run")
    assert scalars["loss"] == {1: 0.5}
    assert histograms["Gradients/0.weight"] == [0, 1, 2]
    sizes = sorted(path.stat().st_size for path in Path("run").iterdir())
    assert len(sizes) == 2
    assert sizes[0] < 200
    without_nothing()


class Holder(nn.Linear):
    """A model with parameters of its own and in a part."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.part = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(super().forward(x))
        return out


def _last_step_of_a_model_that_is_gone() -> set[str]:
    import instrument
    from tests.training import read_back, train

    def training() -> str:
        model = Holder()
        watcher = instrument.watch(model, kinds=["parameters"], interval=100, scalar_interval=100, logdir="run")
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
        return str(watcher.logdir)

    histograms, _ = read_back(training())
    return {tag.removeprefix("Parameters/") for tag, steps in histograms.items() if 2 in steps}


def with_hook_lists() -> None:
    """Ordinarily the last step of a model that is gone is logged whole."""
    assert _last_step_of_a_model_that_is_gone() == {"weight", "bias", "part.weight", "part.bias"}


def without_hook_lists() -> None:
    """Any parameter may have hooks, so none is kept beyond its module: the last step lacks the root's own."""
    assert _last_step_of_a_model_that_is_gone() == {"part.weight", "part.bias"}
    without_nothing()


def _stance_after_an_interrupt() -> str:
    import instrument

    class Interrupted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = Interrupted(4, 4)
    watcher = instrument.watch(model, interval=1, logdir="run", compiled="eager")
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4))
    found: str = torch._dynamo.eval_frame._stance.stance
    watcher.close()
    return found


def with_module_call() -> None:
    """Ordinarily an interrupt in the model ends what a sampled step had changed."""
    assert _stance_after_an_interrupt() == "default"


def without_module_call() -> None:
    """An interrupt passes unseen, and what it leaves uncompiled lasts until the watch is closed."""
    assert _stance_after_an_interrupt() == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "default"  # the watch is closed
    without_nothing()


WITHOUT: list[tuple[Callable[[], None], list[str]]] = [
    (without_nothing, []),
    (without_nothing, [FUNCTION_MODES]),
    (without_graph_task, [GRAPH_TASK]),
    (without_functorch, [FUNCTORCH]),
    (without_a_way_out_of_modes, [DISABLE_MODES]),
    (without_a_count_of_modes, [COUNT_MODES]),
    (without_either, [DISABLE_MODES, COUNT_MODES]),
    (without_set_grad, [SET_GRAD]),
    (with_disable_function, []),
    (without_disable_function, [DISABLE_FUNCTION]),
    (without_code_strategy, CODE_STRATEGY),
    (without_is_fake, [IS_FAKE]),
    (without_flatten, [FLATTEN]),
    (with_step_wrapper, []),
    (without_step_wrapper, [STEP_WRAPPER]),
    (with_scaler_step, []),
    (without_scaler_step, [SCALER_STEP]),
    (without_compiled_call, [COMPILED_CALL]),
    (without_version, [VERSION]),
    (with_module_call, []),
    (without_module_call, [MODULE_CALL]),
    (with_engine, []),
    (without_engine, [ENGINE]),
    (without_the_method_of_the_writer, []),
    (with_hook_lists, []),
    *((without_hook_lists, [name]) for name in HOOK_LISTS),
]


@pytest.mark.parametrize(
    ("function", "missing"), WITHOUT, ids=[" ".join((f.__name__, *(n.split(".")[-1] for n in m))) for f, m in WITHOUT]
)
def test_without_a_private_name_training_is_the_same(
    function: Callable[[], None], missing: list[str], nursery: Nursery, tmp_path: Path
) -> None:
    """With a name missing, training is bit-identical, nothing raises, and what the table says happens."""
    nursery.check(function, missing, tmp_path)


def test_a_module_without_compiled_call_counts_as_plain() -> None:
    """Without the marks of `torch.compile`, no module is taken for a compiled one; with either it is."""
    from instrument.torch_private import is_compiled

    assert not is_compiled(cast(nn.Module, SimpleNamespace()))
    assert is_compiled(cast(nn.Module, SimpleNamespace(_compiled_call_impl=print)))
    assert is_compiled(cast(nn.Module, torch.compile(nn.Linear(1, 1), backend="eager")))
    compiled = nn.Linear(1, 1)
    assert not is_compiled(compiled)
    compiled.compile(backend="eager")
    assert is_compiled(compiled)


@pytest.mark.filterwarnings("ignore::instrument.InstrumentWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["compile", "in place", "blocks", "blocks in place", "function"])
def test_without_marks_of_compiled_modules_the_numbers_stay(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where compiled modules are not known as such, hooks cost at most one graph more and change no number."""
    from tests.test_compile import Net, names, train

    bare = train(Net, how, "eager", None, tmp_path)
    monkeypatch.setattr("instrument.capture.names.is_compiled", lambda module: False)
    for when in ("before", "after"):
        watched = train(Net, how, "eager", when, tmp_path)
        assert watched.losses == bare.losses
        assert watched.graphs - bare.graphs in (0, 1)
        assert watched.breaks == bare.breaks
        assert names(watched.records[-1], "Gradients") == {name for name, _ in Net().named_parameters()}


def _calls_seen_in_a_compiled_function(logdir: Path) -> list[int]:
    """Elements of the root's output in each sampled step, where a compiled function calls the model twice a step."""
    import instrument

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    function = torch.compile(lambda x: model(x), backend="eager")
    watcher = instrument.watch(model, kinds=["activations"], interval=2, logdir=logdir, compiled="eager")
    for _ in range(4):
        (function(torch.ones(3, 4)) + function(torch.zeros(3, 4))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watcher.close()
    torch._dynamo.reset()
    return [record["Activations/Sequential"].count for record in watcher.history]


def test_without_frames_of_dynamo_one_call_of_a_compiled_function_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where callers are not known as compiled, `compiled="eager"` sees the first call of a step alone."""
    assert _calls_seen_in_a_compiled_function(tmp_path / "with") == [12, 12]
    monkeypatch.setattr("instrument.torch_private._EVAL_FRAME_FILE", "nowhere")
    assert _calls_seen_in_a_compiled_function(tmp_path / "without") == [6, 6]


def test_without_the_dictionaries_of_modules_public_iterators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `_modules` and `_parameters` the same children and parameters are found; a twin child once."""
    from torch.nn.utils import parametrizations

    from instrument import torch_private

    def found(module: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, nn.Parameter | None]]:
        return torch_private.children_of(module), torch_private.parameters_of(module)

    module = parametrizations.spectral_norm(nn.Linear(3, 3))
    module.tied = module.bias
    module.part = module.again = nn.ReLU()
    module.register_parameter("absent", None)
    children, parameters = found(module)
    assert [name for name, _ in children] == ["parametrizations", "part", "again"]
    assert list(parameters) == ["bias", "tied", "absent"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    monkeypatch.setattr(torch_private, "_module_attributes", frozenset())
    public_children, public_parameters = found(module)
    assert public_children == children[:2]
    assert list(public_parameters) == ["bias", "tied"]
    assert all(public_parameters[name] is parameters[name] for name in public_parameters)
    for name, value in module.state_dict().items():  # no power iteration was done
        assert torch.equal(value, before[name])


def test_marks_for_dynamo_are_those_that_torch_sets() -> None:
    """The two marks that are set by hand are among those that torch's own decorators leave on a function."""
    from instrument.torch_private import never_compile, run_while_tracing

    def marks(decorate: Callable[[Any], Any]) -> dict[str, Any]:
        def function() -> None:
            pass

        return dict(vars(decorate(function)))

    constant: Any = torch.compiler.assume_constant_result
    assert marks(run_while_tracing) == marks(constant) == {"_dynamo_marked_constant": True}
    assert marks(never_compile) == {"_torchdynamo_disable": True}
    assert marks(torch.compiler.disable)["_torchdynamo_disable"] is True


def test_the_scale_of_an_unknown_scaler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `_scale`, or with something else in it, there is no scale; with a tensor there is."""
    from instrument import torch_private

    class Scaler:
        def step(self) -> torch.Tensor | None:
            return torch_private.calling_scale()

    scaler: Any = Scaler()
    assert scaler.step() is None
    monkeypatch.setattr(torch_private, "_SCALER_STEP_CODE", Scaler.step.__code__)
    assert scaler.step() is None
    scaler._scale = 4.0
    assert scaler.step() is None
    scaler._scale = torch.tensor(4.0)
    assert scaler.step() is scaler._scale


def test_without_the_handle_of_fsdp1_its_shards_count_as_copies() -> None:
    """A wrapper whose handle or flat parameter is not where it was gives nothing, and raises nothing."""
    from instrument.torch_private import flat_parameters

    wrapper = type("FullyShardedDataParallel", (nn.Linear,), {})
    for handle in (None, SimpleNamespace(), SimpleNamespace(flat_param=nn.Parameter(torch.ones(2)))):
        model = nn.Sequential(wrapper(2, 2))
        cast(Any, model[0])._handle = handle
        assert flat_parameters(model) == {}
    assert flat_parameters(nn.Sequential(wrapper(2, 2))) == {}


def test_the_table_names_what_is_looked_up_and_nothing_else() -> None:
    """Each private name in the code has a row in the table, each row a name in the code, and a stand-in."""
    table, code = SHIM.read_text().split('"""', 2)[1:]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 15
    assert all(len(row) == 3 and all(row) for row in rows)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row[1]) if "(" not in name}
    looked_up = {*re.findall(r'_lookup\(\s*"(torch[\w.]+)"', code), *CODE_STRATEGY}
    assert len(looked_up) > 10
    # Two ranks are asked to meet without a store in the tests with two processes.
    assert looked_up <= {name for _, missing in WITHOUT for name in missing} | {MEETING_STORE}
    leaves = {re.split(r"[./]", name.removesuffix(".py"))[-1] for name in names}
    assert {name.rsplit(".", 1)[1] for name in looked_up} <= leaves
    for leaf in leaves - {"_get_file_writer"}:  # a method that is replaced in a subclass, in `record/writer.py`
        assert leaf in code or not leaf.startswith("_"), leaf


def test_no_string_elsewhere_reaches_for_a_private_name() -> None:
    """Outside of the shim no `getattr`, `hasattr`, `setattr`, `delattr` or `vars()[...]` takes a private name."""
    checked = 0
    for path in (PROJECT / "instrument").rglob("*.py"):
        if "integrations" in path.parts:  # what they reach for is their trainer's, not torch's
            continue
        if path == SHIM:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            checked += 1
            key: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                key = node.args[1] if node.func.id in {"getattr", "hasattr", "setattr", "delattr"} else None
                if ast.unparse(node.args[0]) == "self":
                    key = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(("__dict__", ")")):
                key = node.slice
            name = str(key.value) if isinstance(key, ast.Constant) else ""
            assert not re.match(r"_(?!_)(?!fields)", name), f"{path} reaches for {name}"
    assert checked > 10_000


def test_ctrl_c_on_the_way_into_hiding_leaves_gradients_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes when gradients have just been switched off, and nobody is to switch them on again."""
    from instrument import torch_private

    switch, signals = torch_private._set_grad_enabled, [KeyboardInterrupt]

    def interrupted(mode: bool) -> None:
        switch(mode)
        if signals:
            raise signals.pop()

    monkeypatch.setattr(torch_private, "_set_grad_enabled", interrupted)
    with pytest.raises(KeyboardInterrupt), torch_private.Unseen():
        raise AssertionError("not reached")
    assert torch.is_grad_enabled()
