"""Bad input to the public functions: refused at once, in words that help, with nothing left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import instrument
from instrument import ConfigError, InstrumentError, SelectionError, TensorBoardLogger, watch
from instrument.watcher.watcher import watchers

from .training import hooks_on, mlp


class NoMethods:
    """A writer that is none."""

    def __repr__(self) -> str:
        return "NoMethods()"


ROWS: list[tuple[str, Callable[[nn.Module], Any], type[InstrumentError], str]] = [
    ("no module", lambda m: watch("model"), ConfigError, "model is 'model', allowed is a torch.nn.Module"),  # type: ignore[arg-type]
    ("a class", lambda m: watch(nn.Linear), ConfigError, "allowed is a torch.nn.Module"),  # type: ignore[arg-type]
    ("unwatch no module", lambda m: instrument.unwatch(3), ConfigError, "model is 3, allowed is a torch.nn.Module"),  # type: ignore[arg-type]
    ("empty include", lambda m: watch(m, include=[]), SelectionError, "include is empty, so nothing is left to watch; '**' includes every name"),
    ("empty glob", lambda m: watch(m, include=""), ConfigError, "include: found '', allowed is a glob or several"),
    ("include of numbers", lambda m: watch(m, include=[3]), ConfigError, "include: found 3, allowed is a glob or several"),  # type: ignore[list-item]
    ("pattern without match", lambda m: watch(m, include=["0", "head"]), SelectionError, "include='head' matches no name"),
    ("near miss", lambda m: watch(m, include="0.wieght"), SelectionError, "nearest: '0.weight'"),
    ("broken regular expression", lambda m: watch(m, include="re:("), SelectionError, "is no valid regular expression"),
    ("exclude everything", lambda m: watch(m, exclude="**"), SelectionError, "nothing is left to watch: include='**', exclude='**'"),
    ("unknown kind", lambda m: watch(m, kinds=["gradient"]), ConfigError, "kinds: found 'gradient', allowed are 'activations', 'activation_gradients', 'parameters', 'gradients', 'updates'; did you mean 'gradients'?"),
    ("no kinds", lambda m: watch(m, kinds=[]), SelectionError, "kinds is empty"),
    ("kinds of None", lambda m: watch(m, kinds=None), ConfigError, "kinds: found None"),  # type: ignore[arg-type]
    ("interval as text", lambda m: watch(m, interval="10"), ConfigError, "interval: found '10', allowed is a whole number"),  # type: ignore[arg-type]
    ("interval as fraction", lambda m: watch(m, interval=2.5), ConfigError, "interval: found 2.5, allowed is a whole number"),  # type: ignore[arg-type]
    ("interval as bool", lambda m: watch(m, interval=True), ConfigError, "interval: found True, allowed is a whole number; 0 or a negative number switches the watch off"),
    ("interval as NaN", lambda m: watch(m, interval=float("nan")), ConfigError, "interval: found nan"),  # type: ignore[arg-type]
    ("scalar interval of zero", lambda m: watch(m, scalar_interval=0), ConfigError, "scalar_interval: found 0, allowed is a whole number of at least 1"),
    ("scalar interval as bool", lambda m: watch(m, scalar_interval=True), ConfigError, "scalar_interval: found True"),
    ("negative first step", lambda m: watch(m, initial_step=-1), ConfigError, "initial_step: found -1, allowed is a whole number of at least 0"),
    ("first step as text", lambda m: watch(m, initial_step="5"), ConfigError, "initial_step: found '5'"),  # type: ignore[arg-type]
    ("writer without methods", lambda m: watch(m, writer=NoMethods()), ConfigError, "writer is NoMethods(), which has no add_scalar and no add_histogram_raw; allowed is anything with the methods of torch.utils.tensorboard.SummaryWriter"),
    ("writer as path", lambda m: watch(m, writer="runs"), ConfigError, "writer is 'runs', which has no add_scalar"),
    ("optimizer of another kind", lambda m: watch(m, optimizer=3), ConfigError, "optimizer is 3, allowed is a torch.optim.Optimizer; for others call watcher.step()"),  # type: ignore[arg-type]
    ("unknown compiled", lambda m: watch(m, compiled="outsid"), ConfigError, "compiled: found 'outsid', allowed is one of 'outside', 'graph', 'eager'; did you mean 'outside'?"),
    ("unknown ranks", lambda m: watch(m, ranks="any"), ConfigError, "ranks: found 'any', allowed is one of 'first', 'merge', 'each'"),
    ("functions of another kind", lambda m: watch(m, functions=["gelu"]), ConfigError, "functions: found ['gelu']"),  # type: ignore[arg-type]
    ("config without file", lambda m: watch(m, config="nowhere.json"), ConfigError, "configuration nowhere.json cannot be read"),
    ("config with a wrong key", lambda m: watch(m, config={"interval": 3}), ConfigError, "unknown key 'interval' (value 3)"),
    ("logdir of another kind", lambda m: watch(m, logdir=3), ConfigError, "logdir is 3, allowed is a path"),  # type: ignore[arg-type]
    ("logger without methods", lambda m: TensorBoardLogger(NoMethods()), ConfigError, "logdir_or_writer is NoMethods(), allowed is a directory or anything with the methods of"),
    ("logger of no module", lambda m: TensorBoardLogger("x").log_model_histograms({}, 0), ConfigError, "model is {}, allowed is a torch.nn.Module"),  # type: ignore[arg-type]
    ("logger of a list", lambda m: TensorBoardLogger("x").log_activation_histograms([torch.ones(1)], 0), ConfigError, "activations is list, allowed is a mapping from name to tensor"),  # type: ignore[arg-type]
    ("logger of numbers", lambda m: TensorBoardLogger("x").log_activation_histograms({"a": 1}, 0), ConfigError, "activations['a'] is int, allowed is a torch.Tensor"),  # type: ignore[dict-item]
    ("logger without step", lambda m: TensorBoardLogger("x").log_model_histograms(m, None), ConfigError, "step is None, allowed is a whole number"),  # type: ignore[arg-type]
    ("port out of range", lambda m: instrument.launch_tensorboard(port=70000), ConfigError, "port: found 70000, allowed is a whole number from 1 to 65535"),
    ("no runs to show", lambda m: instrument.launch_tensorboard("nowhere"), instrument.RunError, "there is no directory nowhere to show"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call", "error", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_bad_input_is_refused_in_words_that_help(
    name: str, call: Callable[[nn.Module], Any], error: type[InstrumentError], words: str, tmp_path: Path
) -> None:
    """Each row is refused at once with these words, and leaves no hook, no run and no watch behind."""
    model = mlp()
    before = hooks_on(model)
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert hooks_on(model) == before
    assert not (tmp_path / "runs").exists()
    assert not watchers


def test_an_exclude_without_a_match_is_a_warning_and_a_notice(tmp_path: Path) -> None:
    """A misspelt exclude is warned of and noted, and the watch goes on."""
    with pytest.warns(instrument.InstrumentWarning, match="exclude='dropout' matches no name and does nothing"):
        watcher = watch(mlp(), exclude="dropout", logdir=tmp_path)
    assert len(watcher.notices) == 1
