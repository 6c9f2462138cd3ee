"""Configuration: one frozen object, checked when it is made.

Requirements that shaped it:

* the four keys of the original TensorBoard document keep their names and defaults
  (`runs_directory`, `default_port`, `max_port_attempts`, `histogram_interval`), ours stand beside them;
* a mistake is told at once, with the file, the key, what was found, what is allowed and the nearest key,
  never at step 10,000;
* the defaults exist once, here; ``configs/tensorboard.json`` repeats them for people to copy and a test
  holds the two together.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from instrument.errors import ConfigError

__all__ = [
    "COMPILED_MODES",
    "CONFIG_ENVIRONMENT_VARIABLE",
    "FUNCTIONS",
    "KINDS",
    "RANKS_MODES",
    "SECTIONS",
    "Config",
    "ConfigSource",
    "as_interval",
    "as_kinds",
    "as_patterns",
    "get_histogram_interval",
    "load_config",
]

CONFIG_ENVIRONMENT_VARIABLE = "INSTRUMENT_CONFIG"
DEFAULT_CONFIG_PATH = Path("configs") / "tensorboard.json"
COMMENT_PREFIX = "_"

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


def _as_text(value: object, allowed: str = "a text that is not empty") -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return value


def _as_whole(value: object, low: int | None = None, high: int | None = None) -> int:
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


def _as_share(value: object) -> float:
    """A share from 0 to below 1."""
    allowed = "a share from 0 (no limit) to below 1, such as 0.01"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return float(value)


def _as_choice(value: object, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise ConfigError(f"found {value!r}, allowed is one of {_listed(choices)}{_hint(value, choices)}")


def _as_functions(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"found {value!r}, allowed is a mapping from globs to names of nonlinearities")
    for pattern, function in value.items():
        _as_text(pattern, "a glob as key")
        try:
            _as_choice(function, FUNCTIONS)
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
    return _as_whole(value)


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
    kinds = _as_texts(value, f"one or several of {_listed(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"found {kind!r}, allowed are {_listed(KINDS)}{_hint(kind, KINDS)}")
    if not kinds:
        raise ConfigError(f"found no kind at all, allowed are one or several of {_listed(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _as_texts(value: object, allowed: str) -> tuple[str, ...]:
    if isinstance(value, str):
        items: tuple[object, ...] = (value,)
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        items = tuple(value)
    else:
        raise ConfigError(f"found {value!r}, allowed is {allowed}")
    return tuple(_as_text(item, allowed) for item in items)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)


def _hint(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _key(default: Any, check: Callable[[Any], Any]) -> Any:
    """A field of `Config` with its check, so that both stand on one line."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings, checked; make a changed copy with `dataclasses.replace`.

    Raises:
        ConfigError: A value that cannot be used; the message names the key, what was found and what is
            allowed.

    Example:
        >>> Config(histogram_interval=50).histogram_interval
        50
    """

    runs_directory: str = _key("runs", _as_text)
    """Where run directories are made and where TensorBoard looks for them."""

    default_port: int = _key(6006, lambda value: _as_whole(value, 1, 65535))
    """First TCP port that is tried for TensorBoard."""

    max_port_attempts: int = _key(10, lambda value: _as_whole(value, 1, 65535))
    """How many ports are tried, counted from `default_port`."""

    histogram_interval: int = _key(100, as_interval)
    """Steps between histograms; 0 or negative switches everything off."""

    scalar_interval: int = _key(10, lambda value: _as_whole(value, 1))
    """Steps between samples for scalars; where it is larger than the histogram interval, that counts."""

    include: tuple[str, ...] = _key(("**",), lambda value: as_patterns(value, allow_empty=False))
    """Globs over names; what matches one of them is watched."""

    exclude: tuple[str, ...] = _key((), as_patterns)
    """Globs over names; what matches one of them is not watched."""

    kinds: tuple[str, ...] = _key(("activations", "parameters", "gradients"), as_kinds)
    """What is watched, of the five kinds in `KINDS`."""

    compiled: str = _key("outside", lambda value: _as_choice(value, COMPILED_MODES))
    """What to do inside regions of ``torch.compile``."""

    ranks: str = _key("first", lambda value: _as_choice(value, RANKS_MODES))
    """Which ranks measure and write under ``torch.distributed``."""

    functions: Mapping[str, str] = _key({}, _as_functions)
    """Nonlinearities that are called as functions: glob over module names to function name."""

    history: int = _key(64, lambda value: _as_whole(value, 1))
    """Step records kept in memory."""

    budget: float = _key(0.0, _as_share)
    """Share of the training time that the watch may take, by sampling more rarely; 0 means no limit."""

    histogram_sample_above: int = _key(0, lambda value: _as_whole(value, 0))
    """Elements of a tensor beyond which its histogram is of about as many of them, 8192 at least; 0 means of all."""

    dead_window_samples: int = _key(4096, lambda value: _as_whole(value, 1))
    """Samples a unit must have been silent for before it is called dead."""

    dead_window_batches: int = _key(32, lambda value: _as_whole(value, 1))
    """Batches a unit must have been silent for before it is called dead."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                checked = field.metadata["check"](getattr(self, field.name))
            except ConfigError as error:
                raise ConfigError(f"{field.name}: {error}") from None
            object.__setattr__(self, field.name, checked)


ConfigSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Config"
"""What a `config` argument may be: a path to a JSON file, a mapping of keys, or a `Config`."""


def load_config(config: ConfigSource | None = None) -> Config:
    """Load the configuration from where it is to be found, and check it.

    Args:
        config: A path to a JSON file, a mapping of keys, or a `Config`. Without one, the path in the
            environment variable ``INSTRUMENT_CONFIG``, else ``configs/tensorboard.json`` under the working
            directory, else the defaults.

    Returns:
        The configuration. Keys that are not given keep their defaults; keys that begin with ``_`` are
        comments.

    Raises:
        ConfigError: A file that cannot be read, malformed JSON, an unknown key, a wrong type or an
            impossible value.

    Example:
        >>> load_config({"histogram_interval": 20}).histogram_interval
        20
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return _from_mapping(config, "the configuration given")
    if isinstance(config, (str, os.PathLike)):
        return _from_file(Path(config))
    if config is not None:
        raise ConfigError(f"config is {config!r}, allowed is a path, a mapping of keys or a Config")
    named = os.environ.get(CONFIG_ENVIRONMENT_VARIABLE)
    if named:
        return _from_file(Path(named), f" (named by {CONFIG_ENVIRONMENT_VARIABLE})")
    if DEFAULT_CONFIG_PATH.is_file():
        return _from_file(DEFAULT_CONFIG_PATH)
    return Config()


def _from_file(path: Path, origin: str = "") -> Config:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"configuration {path}{origin} cannot be read: {error}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"configuration {path}{origin} is no valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path}{origin} holds {type(values).__name__}, allowed is an object of keys")
    return _from_mapping(values, f"configuration {path}{origin}")


def _from_mapping(values: Mapping[str, Any], source: str) -> Config:
    known = [field.name for field in dataclasses.fields(Config)]
    settings = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{source}: key {key!r} is no text, allowed are {_listed(known)}")
        if key.startswith(COMMENT_PREFIX):
            continue
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {key!r} (value {value!r}){_hint(key, known)} Allowed are {_listed(known)}"
            )
        settings[key] = value
    try:
        return Config(**settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def get_histogram_interval(config: ConfigSource | None = None) -> int:
    """Steps between histograms, for loops that log by hand; 0 or negative means: do not log.

    Args:
        config: As in `load_config`.

    Returns:
        The value of the key `histogram_interval`.

    Raises:
        ConfigError: As in `load_config`.

    Example:
        >>> get_histogram_interval({"histogram_interval": 25})
        25
    """
    return load_config(config).histogram_interval
