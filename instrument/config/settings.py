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
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from instrument.config.checks import (
    COMPILED_MODES,
    RANKS_MODES,
    as_choice,
    as_functions,
    as_interval,
    as_kinds,
    as_patterns,
    as_share,
    as_text,
    as_whole,
    hint,
    listed,
    setting,
)
from instrument.config.thresholds import Thresholds
from instrument.errors import ConfigError

__all__ = ["CONFIG_ENVIRONMENT_VARIABLE", "Config", "ConfigSource", "get_histogram_interval", "load_config"]

CONFIG_ENVIRONMENT_VARIABLE = "INSTRUMENT_CONFIG"
DEFAULT_CONFIG_PATH = Path("configs") / "tensorboard.json"
COMMENT_PREFIX = "_"


@dataclasses.dataclass(frozen=True)
class Config(Thresholds):
    """All settings, checked; make a changed copy with `dataclasses.replace`.

    Raises:
        ConfigError: A value that cannot be used; the message names the key, what was found and what is
            allowed.

    Example:
        >>> Config(histogram_interval=50).histogram_interval
        50
    """

    runs_directory: str = setting("runs", as_text)
    """Where run directories are made and where TensorBoard looks for them."""

    default_port: int = setting(6006, lambda value: as_whole(value, 1, 65535))
    """First TCP port that is tried for TensorBoard."""

    max_port_attempts: int = setting(10, lambda value: as_whole(value, 1, 65535))
    """How many ports are tried, counted from `default_port`."""

    histogram_interval: int = setting(100, as_interval)
    """Steps between histograms; 0 or negative switches everything off."""

    scalar_interval: int = setting(10, lambda value: as_whole(value, 1))
    """Steps between samples for scalars; where it is larger than the histogram interval, that counts."""

    include: tuple[str, ...] = setting(("**",), lambda value: as_patterns(value, allow_empty=False))
    """Globs over names; what matches one of them is watched."""

    exclude: tuple[str, ...] = setting((), as_patterns)
    """Globs over names; what matches one of them is not watched."""

    kinds: tuple[str, ...] = setting(("activations", "parameters", "gradients"), as_kinds)
    """What is watched, of the five kinds in `KINDS`."""

    compiled: str = setting("outside", lambda value: as_choice(value, COMPILED_MODES))
    """What to do inside regions of ``torch.compile``."""

    ranks: str = setting("first", lambda value: as_choice(value, RANKS_MODES))
    """Which ranks measure and write under ``torch.distributed``."""

    functions: Mapping[str, str] = setting({}, as_functions)
    """Nonlinearities that are called as functions: glob over module names to function name."""

    history: int = setting(64, lambda value: as_whole(value, 1))
    """Step records kept in memory."""

    budget: float = setting(0.0, as_share)
    """Share of the training time that the watch may take, by sampling more rarely; 0 means no limit."""

    histogram_sample_above: int = setting(0, lambda value: as_whole(value, 0))
    """Elements of a tensor beyond which its histogram is of about as many of them, 8192 at least; 0 means of all."""

    dead_window_samples: int = setting(4096, lambda value: as_whole(value, 1))
    """Samples a unit must have been silent for before it is called dead."""

    dead_window_batches: int = setting(32, lambda value: as_whole(value, 1))
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
            raise ConfigError(f"{source}: key {key!r} is no text, allowed are {listed(known)}")
        if key.startswith(COMMENT_PREFIX):
            continue
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {key!r} (value {value!r}){hint(key, known)} Allowed are {listed(known)}"
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
