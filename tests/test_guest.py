"""The guest's oath: training with and without the watch is the same to the last bit."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import instrument
from instrument.config import KINDS

from .training import batch, hooks_on, mlp, train


class Everything(nn.Module):
    """A model with what usually goes wrong: in-place ReLU, batch norm, dropout, a shared and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(8, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers, the shared one twice, with in-place additions on the way."""
        x = self.act(self.norm(self.inp(x)))
        x = self.act(self.shared(x))
        y = self.shared(self.drop(x))
        y += x
        out: torch.Tensor = self.out(y)
        return out


MAKERS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "mlp": lambda dtype: mlp(0, dtype),
    "everything": lambda dtype: Everything().to(dtype),
    "cnn": lambda dtype: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 2)
    ).to(dtype),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_parameters_and_random_state_are_bit_identical(
    make: str, optimizer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """50 steps with every kind watched on every step give the losses, parameters and random state without."""

    def run(watched: bool) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # the global state is what must not be touched
        model = MAKERS[make](dtype)
        chosen = OPTIMIZERS[optimizer](model)
        watcher = None
        if watched:
            watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
        losses = train(model, chosen, 50)
        state = model.state_dict()
        randomness = torch.cat((torch.get_rng_state().float(), torch.tensor([random.random(), np.random.rand()])))
        if watcher is not None:
            assert len(watcher.history) == 50
            watcher.close()
        return losses, state, randomness

    plain, watched = run(watched=False), run(watched=True)
    assert plain[0] == watched[0]
    assert list(plain[1]) == list(watched[1])
    assert all(torch.equal(plain[1][name], watched[1][name]) for name in plain[1])
    assert torch.equal(plain[2], watched[2])


def test_between_sampled_steps_no_hook_exists(tmp_path: Path) -> None:
    """After a sampled step only the optimizer's pair of hooks remains; after closing nothing does."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert hooks_on(model) == 0
    watcher = instrument.watch(model, kinds=KINDS, interval=10, scalar_interval=10, logdir=tmp_path, strict=True)
    train(model, optimizer, 3)
    assert hooks_on(model) == 2
    watcher.close()
    assert hooks_on(model) == 0


def test_evaluation_after_a_sampled_forward_sees_no_hooks_on_its_layers(tmp_path: Path) -> None:
    """An evaluation in the middle of a sampled step runs without hooks on the layers."""
    model = mlp()
    instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    model(batch(0)).mean().backward()
    assert model[0]._forward_hooks
    model.eval()
    with torch.no_grad():
        model(batch(0))
    assert not model[0]._forward_hooks
    instrument.unwatch(model)


def test_modules_whose_hooks_were_thrown_away_are_watched_again(tmp_path: Path) -> None:
    """Code that gives a module a new dictionary of hooks, as to strip a model of all, does not blind the next steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    train(model, optimizer, 2)
    model[0]._forward_hooks = OrderedDict()
    train(model, optimizer, 2, first=2)
    assert ["Activations/0" in record for record in watcher.history] == [True] * len(watcher.history)
    assert len(watcher.history) >= 3
    watcher.close()
    assert hooks_on(model) == 0


def test_nothing_is_set_on_the_users_objects(tmp_path: Path) -> None:
    """Neither the model, nor its modules, parameters or optimizer get an attribute, buffer or state of ours."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    things = [*model.modules(), optimizer, *model.parameters()]
    before = [set(vars(thing)) for thing in things]
    keys = list(model.state_dict())
    instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
    train(model, optimizer, 3, first=1)
    assert [set(vars(thing)) for thing in things] == before
    assert list(model.state_dict()) == keys
    instrument.unwatch(model)


def test_a_fault_of_ours_is_told_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that raises warns once a site, names itself in the notices, and changes no number."""
    plain = mlp()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 5)

    def broken(tensors: Iterable[torch.Tensor], *_: Any) -> list[Exception]:
        return [ZeroDivisionError("deliberate") for _ in tensors]

    model = mlp()
    watcher = instrument.watch(model, include=["0"], kinds=("gradients",), interval=1, logdir=tmp_path)
    monkeypatch.setattr("instrument.watcher.collector.measure_later", broken)
    with pytest.warns(
        instrument.InstrumentWarning, match=r"gradients of 0\.(weight|bias): this library failed"
    ) as caught:
        assert train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5) == expected
    assert len(caught) == 2
    assert [notice.split(":")[0] for notice in watcher.notices] == ["gradients of 0.weight", "gradients of 0.bias"]
    assert "ZeroDivisionError: deliberate" in watcher.notices[0]
    watcher.close()


def test_warnings_as_errors_do_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where warnings are errors, as in this test suite, a fault of ours still raises nothing."""

    def broken(tensors: Iterable[torch.Tensor], *_: Any) -> list[Exception]:
        return [ZeroDivisionError("deliberate") for _ in tensors]

    model = mlp()
    watcher = instrument.watch(model, interval=1, logdir=tmp_path)
    monkeypatch.setattr("instrument.watcher.collector.measure_later", broken)
    assert len(train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)) == 3
    assert watcher.notices
    watcher.close()


def test_strict_raises_faults_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `strict=True` the same fault is raised where it happens."""

    def broken(tensors: Iterable[torch.Tensor], *_: Any) -> list[Exception]:
        return [ZeroDivisionError("deliberate") for _ in tensors]

    model = mlp()
    instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    monkeypatch.setattr("instrument.watcher.collector.measure_later", broken)
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    monkeypatch.undo()
    instrument.unwatch(model)


def test_what_cannot_be_measured_is_a_notice(tmp_path: Path) -> None:
    """A layer that returns a meta tensor is named once, and everything else is recorded."""

    class Meta(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to("meta")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.odd = Meta()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.odd(x)
            out: torch.Tensor = self.fc(x)
            return out

    model = Net()
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    with pytest.warns(instrument.InstrumentWarning, match="meta device"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert watcher.notices == ("activations of odd are not measured: it is on the meta device and has no values",)
    assert "Activations/fc" in watcher.history[-1]
    watcher.close()


def test_modules_are_left_as_the_interpreter_holds_them(tmp_path: Path) -> None:
    """No module gets a dictionary that it had not: asked for one, CPython makes it, and later calls are slower."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def held() -> list[list[type]]:
        return [[type(thing) for thing in gc.get_referents(module)] for module in model.modules()]

    before = held()
    with instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True):
        train(model, optimizer, 2)
    assert held() == before
