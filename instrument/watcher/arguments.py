"""What was given to `watch()`, put before the configuration file and checked at once."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from instrument.config import Config, ConfigSource, as_interval, load_config
from instrument.errors import ConfigError, SelectionError

__all__ = [
    "EVERYTHING",
    "FIRST",
    "NOTHING",
    "OUTSIDE",
    "USUAL_KINDS",
    "check_directory",
    "check_model",
    "check_optimizer",
    "check_step",
    "settings",
]


class _Default(str):
    """A text that stands for "not given", so that the file's value counts; equal to the text it shows."""

    __slots__ = ()


EVERYTHING: tuple[str, ...] = ("**",)
NOTHING: tuple[str, ...] = ()
USUAL_KINDS: tuple[str, ...] = ("activations", "parameters", "gradients")
OUTSIDE: str = _Default("outside")
FIRST: str = _Default("first")
"""Defaults in the signature of `watch`; an argument that is not this very object was given."""


def settings(config: ConfigSource | None, interval: object, defaults: dict[str, object], **given: object) -> Config:
    """The configuration with what was given to `watch()` put before it.

    Args:
        config: As in `load_config`.
        interval: Steps between histograms, or None.
        defaults: For each key, the object that means "not given".
        given: For each key, what `watch()` received.

    Returns:
        The settings in force.

    Raises:
        ConfigError: A value that cannot be used.
        SelectionError: No glob or no kind at all.
    """
    base = load_config(config)
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not defaults.get(key)}
    for key in ("include", "kinds"):
        if key in changes and not isinstance(changes[key], str) and _is_empty(changes[key]):
            raise SelectionError(f"{key} is empty, so nothing is left to watch; '**' includes every name")
    if interval is not None:
        try:
            changes["histogram_interval"] = as_interval(interval)
        except ConfigError as error:
            raise ConfigError(f"interval: {error}; 0 or a negative number switches the watch off") from None
    return dataclasses.replace(base, **changes)


def _is_empty(value: object) -> bool:
    return hasattr(value, "__len__") and len(value) == 0


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        ConfigError: The model is something else.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {model!r}, allowed is a torch.nn.Module")


def check_directory(directory: object) -> str | None:
    """A directory as a text, or None where none was given.

    Raises:
        ConfigError: It is no path.
    """
    if directory is None:
        return None
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise ConfigError(f"logdir is {directory!r}, allowed is a path")
    return str(os.fspath(directory))


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer that torch will tell of: what was given, or what that wraps.

    Raises:
        ConfigError: It is no `torch.optim.Optimizer`, so that its steps cannot be seen.
    """
    if optimizer is None:
        return None
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is {optimizer!r}, allowed is a torch.optim.Optimizer; for others call watcher.step() at the "
            "end of each step"
        )
    return optimizer


def check_step(step: object, name: str) -> int:
    """A number of a step: whole and not negative.

    Raises:
        ConfigError: It is something else.
    """
    try:
        number = as_interval(step)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if number < 0:
        raise ConfigError(f"{name}: found {number}, allowed is a whole number of at least 0")
    return number
