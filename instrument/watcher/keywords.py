"""The keywords of `watch()`, checked before there is a model: for trainers' callbacks and for scripts."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from instrument.capture.patterns import Patterns
from instrument.config import Config, as_interval, load_config
from instrument.errors import ConfigError
from instrument.watcher.watch import watch

__all__ = ["check_keywords"]


def check_keywords(given: Mapping[str, Any]) -> tuple[dict[str, Any], Config]:
    """Refuse at once what `watch()` would refuse of any model, so that no training begins in vain.

    Args:
        given: Keywords of `watch`, without the model.

    Returns:
        The keywords to give to `watch` later (iterables as tuples, to be read more than once), and the settings
        that they make.

    Raises:
        ConfigError: An unknown keyword, or a value that cannot be used.
        SelectionError: A pattern that cannot be read, or none at all.

    Example:
        >>> check_keywords({"inteval": 10})
        Traceback (most recent call last):
        ...
        instrument.errors.ConfigError: unknown keyword 'inteval'; did you mean 'interval'?
    """
    known = [name for name in inspect.signature(watch).parameters if name != "model"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "allowed are " + ", ".join(known)
            raise ConfigError(f"unknown keyword {name!r}; {hint}")
    keywords = {name: _kept(value) for name, value in given.items()}
    interval = keywords.get("interval")
    try:
        number = load_config(keywords.get("config")).histogram_interval if interval is None else as_interval(interval)
    except ConfigError as error:
        raise error if interval is None else ConfigError(f"interval: {error}") from None
    # A watch that is off attaches and writes nothing, and yet refuses what cannot be used.
    config = watch(nn.Identity(), **{**keywords, "interval": 0}).config
    Patterns(config.include, config.exclude)
    return keywords, dataclasses.replace(config, histogram_interval=number)


def _kept(value: Any) -> Any:
    """A value that may be read more than once."""
    return tuple(value) if isinstance(value, Iterable) and iter(value) is value else value
