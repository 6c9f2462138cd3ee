"""Checks of single settings: each gives the value in its final form, or says what was found and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from instrument.errors import ConfigError

__all__ = [
    "COMPILED_MODES",
    "FUNCTIONS",
    "KINDS",
    "RANKS_MODES",
    "SECTIONS",
    "as_choice",
    "as_functions",
    "as_interval",
    "as_kinds",
    "as_patterns",
    "as_real",
    "as_share",
    "as_text",
    "as_whole",
    "hint",
    "listed",
    "setting",
]

SECTIONS = {
    "activations": "Activations",
    "activation_gradients": "ActivationGradients",
    "parameters": "Parameters",
    "gradients": "Gradients",
    "updates": "Updates",
}
"""What is watched, and the text before the first slash of its tags."""

KINDS = tuple(SECTIONS)
COMPILED_MODES = ("outside", "graph", "eager")
RANKS_MODES = ("first", "merge", "each")
FUNCTIONS = (
    "relu",
    "relu6",
    "leaky_relu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "swish",
    "mish",
    "tanh",
    "sigmoid",
    "softplus",
    "elu",
    "celu",
    "selu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "logsigmoid",
)
"""Nonlinearities that may stand behind a module as a function; `instrument.measure.slopes` knows their slopes."""


def as_text(value: object, allowed: str = "a text that is not empty") -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return value


def as_whole(value: object, low: int | None = None, high: int | None = None) -> int:
    """A whole number within bounds; bool is refused because ``true`` is never meant as 1."""
    if low is None:
        bounds = "a whole number"
    elif high is None:
        bounds = f"a whole number of at least {low}"
    else:
        bounds = f"a whole number from {low} to {high}"
    if isinstance(value, bool):
        raise ConfigError(f"found {value!r}, allowed is {bounds}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise ConfigError(f"found {value!r}, allowed is {bounds}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise ConfigError(f"found {number}, allowed is {bounds}")
    return number


def as_real(value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds, as `float`; bool is refused because ``true`` is never meant as 1."""
    bounds = "a finite number"
    if low > -math.inf and high < math.inf:
        bounds = f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        bounds = f"a finite number of at least {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"found {value!r}, allowed is {bounds}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"found {value}, allowed is {bounds}")
    return float(value)


def as_share(value: object) -> float:
    """A share from 0, which stands for no limit, to below 1."""
    allowed = "a share from 0 (no limit) to below 1, such as 0.01"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return float(value)


def as_choice(value: object, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if isinstance(value, str) and value in choices:
        return value
    raise ConfigError(f"found {value!r}, allowed is one of {listed(choices)}{hint(value, choices)}")


def as_functions(value: object) -> Mapping[str, str]:
    """A mapping from globs to names of nonlinearities, as a `dict`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"found {value!r}, allowed is a mapping from globs to names of nonlinearities")
    for pattern, function in value.items():
        as_text(pattern, "a glob as key")
        try:
            as_choice(function, FUNCTIONS)
        except ConfigError as error:
            raise ConfigError(f"{pattern!r}: {error}") from None
    return dict(value)


def as_interval(value: object) -> int:
    """Check a number of steps between two histograms; 0 or a negative number switches the watch off.

    Args:
        value: Anything; whole numbers pass, bools, texts and fractions do not.

    Returns:
        The number as `int`.

    Raises:
        ConfigError: The value is no whole number.

    Example:
        >>> as_interval(100)
        100
    """
    return as_whole(value)


def as_patterns(value: object, allow_empty: bool = True) -> tuple[str, ...]:
    """Check one glob or several, and give them as a tuple.

    Args:
        value: A text, or an iterable of texts.
        allow_empty: Whether no glob at all is allowed, as it is for `exclude`.

    Returns:
        The globs, in the order given.

    Raises:
        ConfigError: Something else than texts was given, or nothing where something is needed.

    Example:
        >>> as_patterns("blocks.*")
        ('blocks.*',)
    """
    patterns = _as_texts(value, "a glob or several, such as 'blocks.*'")
    if not patterns and not allow_empty:
        raise ConfigError("found no glob at all, allowed is a glob or several, such as 'blocks.*'")
    return patterns


def as_kinds(value: object) -> tuple[str, ...]:
    """Check the kinds to watch.

    Args:
        value: One or several of `KINDS`.

    Returns:
        The kinds, each once, in the order of `KINDS`.

    Raises:
        ConfigError: An unknown kind, or none.

    Example:
        >>> as_kinds(["gradients", "activations"])
        ('activations', 'gradients')
    """
    kinds = _as_texts(value, f"one or several of {listed(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"found {kind!r}, allowed are {listed(KINDS)}{hint(kind, KINDS)}")
    if not kinds:
        raise ConfigError(f"found no kind at all, allowed are one or several of {listed(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _as_texts(value: object, allowed: str) -> tuple[str, ...]:
    if isinstance(value, str):
        items: tuple[object, ...] = (value,)
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        items = tuple(value)
    else:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return tuple(as_text(item, allowed) for item in items)


def listed(words: Iterable[str]) -> str:
    """Words in quotes, behind commas."""
    return ", ".join(repr(word) for word in words)


def hint(word: object, known: Iterable[str]) -> str:
    """The nearest known word as the end of a sentence; a full stop where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def setting(default: Any, check: Callable[[Any], Any]) -> Any:
    """A field of `Config` with its check, so that both stand on one line."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})
