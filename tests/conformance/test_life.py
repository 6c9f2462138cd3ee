"""Life and death: copies, pickles, replaced modules, exceptions, lazy models."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import instrument
from instrument.config import KINDS
from instrument.watcher.watcher import watchers

from ..training import hooks_on
from .harness import data, of_kind, plain_step, train, twins


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def in_a_sampled_step(model: nn.Module, logdir: Path) -> instrument.Watcher:
    """A watch whose hooks stand on the model."""
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=logdir, strict=True)
    model(data(0)).square().mean().backward()
    return watcher


def test_copies_are_free_and_never_record(tmp_path: Path) -> None:
    """Deep copies and averaged models made in a sampled step work, carry no hook that records, and know nothing."""
    torch.manual_seed(3)
    model = make()
    watcher = in_a_sampled_step(model, tmp_path)
    clone, averaged = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    shallow = copy.copy(model)
    for other in (clone, averaged, shallow):
        assert torch.equal(other(data(1)), model.forward(data(1)))
    clone(data(1)).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert watcher.history[-1]["Activations/0"].count == 48
    assert watchers.keys() == {id(model)}
    watcher.close()
    first: Any = clone[0]
    assert all("instrument" not in type(hook).__module__ for hook in first._forward_hooks.values())


def test_a_saved_model_loads_where_this_library_is_not(tmp_path: Path) -> None:
    """`torch.save(model)` in a sampled step works; the file loads and runs in a process without this library."""
    torch.manual_seed(3)
    model = make()
    watcher = in_a_sampled_step(model, tmp_path / "run")
    torch.save(model, tmp_path / "model.pt")
    expected = model.eval()(data(1))
    watcher.close()
    script = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "instrument":
                    raise ImportError("not here")
        sys.meta_path.insert(0, Blocked())
        import torch
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(101))
        model.train()(x).sum().backward()
        torch.save(model.eval()(x), {str(tmp_path / "out.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_state_dicts_are_untouched(tmp_path: Path) -> None:
    """Keys stay, strict loading works, and a state that is assigned is what is recorded from then on."""
    torch.manual_seed(3)
    model = make()
    keys = list(model.state_dict())
    watcher = in_a_sampled_step(model, tmp_path)
    assert list(model.state_dict()) == keys
    model.load_state_dict(make().state_dict(), strict=True)
    model.load_state_dict(
        {name: torch.full_like(value, 2.0) for name, value in model.state_dict().items()}, assign=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    model(data(1)).mean().backward()
    optimizer.step()
    assert watcher.history[-1]["Parameters/0.weight"].mean == 2.0
    assert "Gradients/0.weight" in watcher.history[-1]
    watcher.close()


@pytest.mark.parametrize("convert", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")])
@pytest.mark.parametrize("swap", [False, True])
def test_a_watched_model_can_be_converted(convert: Any, swap: bool, tmp_path: Path) -> None:
    """`.double()` and `.to()` work on a watched model, also by swapping tensors, and what comes after is recorded."""
    torch.manual_seed(3)
    model = make()
    watcher = in_a_sampled_step(model, tmp_path)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.zero_grad()
        convert(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(data(1).to(model[0].weight.dtype)).mean().backward()  # type: ignore[arg-type]
    optimizer.step()
    assert set(of_kind(watcher.history[-1], "Gradients")) == {name for name, _ in model.named_parameters()}
    watcher.close()


def test_lazy_and_meta_models_work_from_their_first_real_step(tmp_path: Path) -> None:
    """A lazy model, and one on the meta device, may be watched before they have values."""
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    watcher = instrument.watch(lazy, interval=1, logdir=tmp_path / "lazy", strict=True)
    lazy(data(0)).mean().backward()
    torch.optim.SGD(lazy.parameters(), lr=0.1).step()
    assert {"Activations/0", "Gradients/2.weight", "Parameters/0.bias"} <= set(watcher.history[-1])
    assert watcher.current_step == 1
    watcher.close()

    with torch.device("meta"):
        meta = make()
    watcher = instrument.watch(meta, interval=1, logdir=tmp_path / "meta", strict=True)
    meta.to_empty(device="cpu")
    for parameter in meta.parameters():
        nn.init.normal_(parameter)
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    meta(data(0)).mean().backward()
    optimizer.step()
    assert {"Activations/0", "Gradients/2.weight"} <= set(watcher.history[-1])
    assert watcher.notices == ()
    watcher.close()


class Lora(nn.Module):
    """A low-rank addition around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Base plus product of the two factors."""
        out: torch.Tensor = self.base_layer(x) + self.lora_b(self.lora_a(x))
        return out


def test_modules_that_come_later_are_picked_up(tmp_path: Path) -> None:
    """LoRA injected after `watch`, and a head that is replaced, are recorded from the next sampled step on."""

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
        if number == 2:
            model[0] = Lora(model[0])
            model[2] = nn.Linear(8, 3)
            optimizer.add_param_group({"params": [*model[0].lora_a.parameters(), *model[0].lora_b.parameters()]})
            optimizer.add_param_group({"params": list(model[2].parameters())})
        return plain_step(model, optimizer, number)

    watched = twins(make, tmp_path, step)
    before, after = watched.records[1], watched.records[3]
    assert {"0", "1", "2"} <= set(of_kind(before, "Activations"))
    assert {"0", "0.base_layer", "0.lora_a", "0.lora_b"} <= set(of_kind(after, "Activations"))
    assert {"0.lora_a.weight", "0.lora_b.weight", "2.weight"} <= set(of_kind(after, "Gradients"))
    assert "0.base_layer.weight" not in of_kind(after, "Gradients")
    assert "0.base_layer.weight" in of_kind(after, "Parameters")
    assert after["Activations/2"].count == 18


def test_a_model_is_freed_without_the_collector(tmp_path: Path) -> None:
    """A watched model, in a sampled step or between, is freed as soon as its last name goes."""
    gc.disable()
    try:
        for steps in (0, 1, 3):
            model = make()
            instrument.watch(model, kinds=KINDS, interval=2, logdir=tmp_path / str(steps), strict=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(steps):
                plain_step(model, optimizer, step)
            reference = weakref.ref(model)
            del model, optimizer
            assert reference() is None
    finally:
        gc.enable()
    assert not watchers


class Failing(nn.Module):
    """Fails when told to, in forward or in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.out = nn.Linear(8, 2)
        self.error: BaseException | None = None
        self.backward_error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise between the layers, or plant a hook that will."""
        y = self.inp(x)
        if self.error is not None:
            raise self.error
        if self.backward_error is not None:
            planted = self.backward_error

            def fail(gradient: torch.Tensor) -> None:
                raise planted

            y.register_hook(fail)
        out: torch.Tensor = self.out(y)
        return out


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_exceptions_of_the_user_leave_the_next_step_clean(error: BaseException, place: str, tmp_path: Path) -> None:
    """An exception or an interrupt in forward, backward or optimizer reaches the user; the next step is clean."""
    torch.manual_seed(3)
    model = Failing()

    class Optimizer(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise error
            return super().step(closure)

    optimizer = Optimizer(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
    plain_step(model, optimizer, 0)
    if place == "forward":
        model.error = error
    elif place == "backward":
        model.backward_error = error
    else:
        optimizer.fails = True
    with pytest.raises(type(error)):
        plain_step(model, optimizer, 1)
    model.error = model.backward_error = None
    optimizer.fails = False
    plain_step(model, optimizer, 2)
    assert watcher.current_step == 2
    last = watcher.history[-1]
    assert last["Gradients/inp.weight"].count == 32
    assert last["Activations/out"].count == 12
    assert last["Activations/inp"].count == 48
    watcher.close()


def test_a_watched_model_goes_to_a_spawned_process(tmp_path: Path) -> None:
    """A model in the middle of a sampled step can be sent to a spawned process, and works there."""
    script = tmp_path / "spawn.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch, instrument, torch.multiprocessing as mp
            def work(model, queue):
                queue.put(model(torch.ones(1, 4)).detach().numpy().tolist())
            if __name__ == "__main__":
                model = torch.nn.Sequential(torch.nn.Linear(4, 2))
                watcher = instrument.watch(model, interval=1, logdir={str(tmp_path / "run")!r}, strict=True)
                model(torch.ones(2, 4)).mean().backward()
                context = mp.get_context("spawn")
                queue = context.Queue()
                process = context.Process(target=work, args=(model, queue))
                process.start()
                assert queue.get(timeout=60) == model(torch.ones(1, 4)).detach().numpy().tolist()
                process.join(60)
                print("exit", process.exitcode)
            """
        )
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180)
    assert result.stdout == "exit 0\n", result.stderr
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_frozen_layer_is_recorded_without_gradients_and_with_when_unfrozen(tmp_path: Path) -> None:
    """A frozen layer has values and no gradient; unfrozen, its gradient appears without another watch."""

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
        model[0].requires_grad_(number >= 2)
        return plain_step(model, optimizer, number)

    watched = twins(make, tmp_path, step)
    assert ["Gradients/0.weight" in record for record in watched.records] == [False, False, True, True]
    assert all("Parameters/0.weight" in record for record in watched.records)


def test_closing_inside_a_step_is_safe(tmp_path: Path) -> None:
    """A watch that is closed from within a hook or an optimizer step leaves no hook and harms nothing."""
    torch.manual_seed(3)
    model = make()

    class Closing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            instrument.unwatch(model)
            return super().step(closure)

    optimizer = Closing(model.parameters(), lr=0.1)
    instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path / "1", strict=True)
    plain_step(model, optimizer, 0)
    layer: Any = model[0]
    handle = layer.register_forward_hook(lambda module, args, output: instrument.unwatch(model))
    instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path / "2", strict=True)
    plain_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    handle.remove()
    instrument.watch(model, interval=1, logdir=tmp_path / "3").close()
    assert hooks_on(model) == 0
    assert train(make, None).losses
