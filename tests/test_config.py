"""Configuration: where it comes from, what it refuses, and with which words."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from instrument import Config, ConfigError, InstrumentError, get_histogram_interval, load_config

PROJECT = Path(__file__).parents[1]


def test_defaults_are_those_of_the_original_document() -> None:
    """The four keys of the original document have their original defaults, ours stand beside them."""
    config = load_config()
    assert (config.runs_directory, config.default_port, config.max_port_attempts) == ("runs", 6006, 10)
    assert (config.histogram_interval, config.scalar_interval, config.history) == (100, 10, 64)
    assert (config.include, config.exclude) == (("**",), ())
    assert config.kinds == ("activations", "parameters", "gradients")
    assert (config.compiled, config.ranks, dict(config.functions)) == ("outside", "first", {})
    assert (config.dead_window_samples, config.dead_window_batches) == (4096, 32)


def test_the_file_in_configs_equals_the_defaults_in_the_package() -> None:
    """`configs/tensorboard.json` has every key, with the default that the package ships."""
    path = PROJECT / "configs" / "tensorboard.json"
    assert set(json.loads(path.read_text())) == {field.name for field in dataclasses.fields(Config)}
    assert load_config(path) == Config()


@pytest.mark.parametrize("name", ["light", "full"])
def test_presets_load_and_say_what_they_cost(name: str) -> None:
    """The presets are valid, differ from the defaults, and carry their cost as a comment."""
    path = PROJECT / "configs" / f"{name}.json"
    assert load_config(path) != Config()
    assert "%" in json.loads(path.read_text())["_cost"]


def _write(path: Path, **keys: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys))
    return path


def test_an_argument_goes_before_the_environment_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument counts, else the file the environment names, else the one under the working directory."""
    assert get_histogram_interval() == 100
    _write(tmp_path / "configs" / "tensorboard.json", histogram_interval=1)
    assert get_histogram_interval() == 1
    monkeypatch.setenv("INSTRUMENT_CONFIG", str(_write(tmp_path / "other.json", histogram_interval=2)))
    assert get_histogram_interval() == 2
    assert get_histogram_interval(_write(tmp_path / "third.json", histogram_interval=3)) == 3
    assert get_histogram_interval(str(tmp_path / "third.json")) == 3
    assert get_histogram_interval({"histogram_interval": 4}) == 4
    assert get_histogram_interval(Config(histogram_interval=5)) == 5


@pytest.mark.parametrize("interval", [0, -1, -100])
def test_an_interval_of_zero_or_below_is_allowed(interval: int) -> None:
    """0 or a negative interval is no mistake: it switches logging off."""
    assert get_histogram_interval({"histogram_interval": interval}) == interval


def test_comments_and_a_byte_order_mark_are_allowed(tmp_path: Path) -> None:
    """Keys that begin with an underscore are comments; a byte order mark of Windows does no harm."""
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"_why": "notes", "history": 5}).encode())
    assert load_config(path) == Config(history=5)


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("histogram_interval", "100", "found '100', allowed is a whole number"),
    ("histogram_interval", 1.5, "found 1.5, allowed is a whole number"),
    ("histogram_interval", True, "found True, allowed is a whole number"),
    ("histogram_interval", None, "found None, allowed is a whole number"),
    ("histogram_interval", float("nan"), "found nan, allowed is a whole number"),
    ("scalar_interval", 0, "found 0, allowed is a whole number of at least 1"),
    ("scalar_interval", -5, "found -5, allowed is a whole number of at least 1"),
    ("default_port", -1, "found -1, allowed is a whole number from 1 to 65535"),
    ("default_port", 70000, "found 70000, allowed is a whole number from 1 to 65535"),
    ("default_port", "6006", "found '6006', allowed is a whole number from 1 to 65535"),
    ("max_port_attempts", 0, "found 0, allowed is a whole number from 1 to 65535"),
    ("runs_directory", "", "found '', allowed is a text that is not empty"),
    ("runs_directory", 3, "found 3, allowed is a text that is not empty"),
    ("include", [], "found no glob at all, allowed is a glob or several, such as 'blocks.*'"),
    ("include", 5, "found 5, allowed is a glob or several, such as 'blocks.*'"),
    ("include", [""], "found '', allowed is a glob or several, such as 'blocks.*'"),
    ("exclude", [1], "found 1, allowed is a glob or several, such as 'blocks.*'"),
    ("kinds", ["weights"], "found 'weights', allowed are 'activations', 'activation_gradients', 'parameters'"),
    ("kinds", "gradient", "did you mean 'gradients'?"),
    ("kinds", [], "found no kind at all"),
    ("compiled", "inside", "did you mean 'outside'?"),
    ("compiled", 1, "allowed is one of 'outside', 'graph', 'eager'"),
    ("ranks", "all", "found 'all', allowed is one of 'first', 'merge', 'each'"),
    ("functions", ["gelu"], "found ['gelu'], allowed is a mapping from globs to names of nonlinearities"),
    ("functions", {"fc": 3}, "'fc': found 3, allowed is one of 'relu', 'relu6'"),
    ("functions", {"blocks.*.fc1": "gelo"}, "found 'gelo', allowed is one of 'relu', 'relu6'"),
    ("functions", {"blocks.*.fc1": "gelo"}, "did you mean 'gelu'?"),
    ("history", 0, "found 0, allowed is a whole number of at least 1"),
    ("dead_window_samples", "many", "found 'many', allowed is a whole number of at least 1"),
]


@pytest.mark.parametrize(
    ("key", "value", "words"), BAD_VALUES, ids=[f"{key}={value!r}" for key, value, _ in BAD_VALUES]
)
def test_a_bad_value_is_told_with_file_key_and_what_is_allowed(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    """A bad value names the file, the key, what was found and what is allowed; the same from a mapping."""
    with pytest.raises(ConfigError, match=re.escape(words)) as from_mapping:
        load_config({key: value})
    assert f"{key}: " in str(from_mapping.value)
    assert isinstance(from_mapping.value, ValueError)
    assert isinstance(from_mapping.value, InstrumentError)
    path = _write(tmp_path / "bad.json", **{key: value})
    with pytest.raises(ConfigError, match=re.escape(words)) as from_file:
        load_config(path)
    assert str(path) in str(from_file.value)


def test_an_unknown_key_is_told_with_the_nearest(tmp_path: Path) -> None:
    """A misspelt key is told with file, key, value, the nearest key and all that are allowed."""
    path = _write(tmp_path / "bad.json", histogram_intervall=7)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    text = str(error.value)
    assert f"configuration {path}: unknown key 'histogram_intervall' (value 7); did you mean" in text
    assert "'histogram_interval'?" in text
    assert "'max_port_attempts'" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"history": 5,}', "is no valid JSON: line 1, column"),
        ("", "is no valid JSON: line 1, column 1"),
        ("[1, 2]", "holds list, allowed is an object of keys"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_told(content: str, words: str, tmp_path: Path) -> None:
    """Malformed JSON, another type, and bytes that are no text are told with the file and the place."""
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not exist is told, with the environment variable where that named it."""
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        load_config(tmp_path / "nowhere.json")
    monkeypatch.setenv("INSTRUMENT_CONFIG", str(tmp_path / "gone.json"))
    with pytest.raises(ConfigError, match=r"gone\.json \(named by INSTRUMENT_CONFIG\) cannot be read"):
        load_config()


def test_something_else_than_a_source_is_told() -> None:
    """A number as configuration is refused with what is allowed."""
    with pytest.raises(ConfigError, match="config is 5, allowed is a path, a mapping of keys or a Config"):
        load_config(5)  # type: ignore[arg-type]


def test_a_key_that_is_no_text_is_told() -> None:
    """A mapping with a number as key is refused."""
    with pytest.raises(ConfigError, match="key 5 is no text"):
        load_config({5: 1})  # type: ignore[dict-item]
