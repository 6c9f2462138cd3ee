"""The selection that is looked at anew only where the model has changed, against selecting each time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from instrument.capture.names import select
from instrument.capture.patterns import Patterns
from instrument.capture.selector import Selector
from instrument.config import KINDS


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ModuleList([nn.Tanh()]))


def replace_head(model: Any) -> None:
    model[0] = nn.Linear(2, 2, bias=False)


def tie(model: Any) -> None:
    model[1][1].weight = model[0].weight


def rename(model: Any) -> None:
    model._modules["renamed"] = model._modules.pop("0")


def drop_bias(model: Any) -> None:
    model[0].bias = None


def share(model: Any) -> None:
    model[1][1] = model[0]


def compile_inner(model: Any) -> None:
    model[1].compile()


def give_forward(model: Any) -> None:
    model[2].forward = lambda x: x


def hold_itself(model: Any) -> None:
    model[1]._modules["again"] = model


CHANGES = [replace_head, tie, rename, drop_bias, share, compile_inner, give_forward, hold_itself]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_selected_is_what_selecting_anew_gives(change: Callable[[Any], None]) -> None:
    """After any change of the model, and before, the selection is the one that is made from nothing."""
    model, patterns = net(), Patterns(["**"], ["1.0"])
    selector = Selector(model, patterns, KINDS)

    def check() -> None:
        for _ in range(2):
            expected = select(model, patterns, KINDS)
            selector.look()
            assert tuple(selector.modules()) == expected.modules
            assert selector.parameters == expected.parameters
            assert selector.module_names == tuple(module.name for module in expected.modules)

    check()
    change(model)
    check()


def test_names_are_matched_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at ten times, a model that stays the same has its names matched once."""
    calls = []

    def counting(*arguments: object) -> object:
        calls.append(arguments)
        return select(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("instrument.capture.selector.select", counting)
    model = net()
    selector = Selector(model, Patterns(["**"]), KINDS)
    for _ in range(10):
        selector.look()
    assert len(calls) == 1
    model.append(nn.ReLU())
    selector.look()
    assert len(calls) == 2


def test_modules_that_come_where_others_were_are_told_apart() -> None:
    """A module that takes the memory of one that is gone, and so its identity, is found all the same."""
    model = net()
    selector = Selector(model, Patterns(["**"]), KINDS)
    for _ in range(50):
        model[0] = nn.Linear(2, 2)
        gc.collect()
        selector.look()
        assert [*selector.modules()][1].module is model[0]
        assert selector.parameters[0].get() is model[0].weight


def test_the_selector_keeps_nothing_alive() -> None:
    """A model and a module that was taken out are freed although they were selected, and then nothing is selected."""
    model = net()
    selector = Selector(model, Patterns(["**"]), KINDS)
    selector.look()
    gone = weakref.ref(model[0])
    del model[0]
    gc.collect()
    assert gone() is None
    gone_model = weakref.ref(model)
    del model
    gc.collect()
    assert gone_model() is None
    selector.look()
    assert [*selector.modules()] == []
