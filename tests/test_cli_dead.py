"""`instrument dead`, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from instrument.diagnose.figures import NEVER, UNIT_BOX

from .diagnose.statuses import Statuses, status, write_units, write_values
from .test_cli import command

DEAD = list(range(0, 60, 2))


def layer(name: str, dead: list[int], step: int) -> Statuses:
    rates = [0.0 if unit in dead else 0.25 + unit / 128 for unit in range(64)]
    return {name: status(name, rates, step)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two flushes: 30 of 64 units of one layer die, none of another."""
    flushes: dict[int, Statuses] = {
        100: {**layer("blocks.0.relu", [0, 2], 100), **layer("blocks.1.relu", [], 100)},
        200: {**layer("blocks.0.relu", DEAD, 200), **layer("blocks.1.relu", [], 200)},
    }
    write_units(tmp_path / "run" / "logs" / "tensorboard", flushes)
    return tmp_path / "run"


def test_dead_says_which_units_since_when_and_how_sure(run: Path) -> None:
    """The table has a row a layer; a sentence names units, cut short for people, since when, and the bound."""
    result = command("dead", str(run), cwd=run)
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert next(r for r in rows if "blocks.0.relu" in r)[:7] == [
        "blocks.0.relu",
        "relu",
        "64",
        "30",
        "(46.9",
        "%)",
        "0",
    ]
    assert next(row for row in rows if "blocks.1.relu" in row)[-1] == "ok"
    assert result.stdout.splitlines()[-1] == (
        f"blocks.0.relu: units {', '.join(map(str, DEAD[:24]))} and 6 more. Silent since steps 60 to 160. "
        "Each fires less often than once in 1365 samples (4096 seen in 64 batches, 95 % sure)."
    )


def test_json_holds_every_index(run: Path) -> None:
    """As JSON every dead unit is listed, with the step since which it is silent, and nothing else is printed."""
    found = json.loads(command("dead", str(run), "--json", cwd=run).stdout)
    first, second = found["layers"]
    assert (first["name"], first["dead"], first["verdict"]) == ("blocks.0.relu", DEAD, "dead")
    assert first["since"] == {str(unit): 60 if unit in (0, 2) else 160 for unit in DEAD}
    assert first["bound"] == "less often than once in 1365 samples"
    assert first["rate_bound"] == 3 / 4096
    assert (second["name"], second["dead"], second["since"]) == ("blocks.1.relu", [], {})


def test_layer_selects_by_glob(run: Path) -> None:
    """`--layer` takes a glob; without a dead unit among them that is said."""
    result = command("dead", str(run), "--layer", "blocks.1.*", cwd=run)
    assert result.returncode == 0
    assert "blocks.0.relu" not in result.stdout
    assert result.stdout.splitlines()[-1] == "No unit is dead."


def test_layers_that_are_not_judged_yet_are_not_called_well(tmp_path: Path) -> None:
    """Where samples are too few to say, that is said beside "no unit is dead"."""
    early = {"a": status("a", [0.0, 0.5], 10, dead=(), verdict="watching", samples=320)}
    write_units(tmp_path / "run", {10: {**early, **layer("b", [], 10)}})
    result = command("dead", "run", cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "No unit is dead; 1 of 2 layers have too few samples to say."


def test_png_writes_the_unit_maps(run: Path) -> None:
    """`--png FILE` writes the map of one layer, or of several in one picture; orange is what died."""
    result = command("dead", str(run), "--layer", "blocks.0.relu", "--png", "one.png", cwd=run)
    assert result.stdout.splitlines()[-1] == "unit maps: one.png"
    command("dead", str(run), "--png", "both.png", "--json", cwd=run)
    one, both = (Image.open(run / name) for name in ("one.png", "both.png"))
    assert both.size == (2 * one.width, one.height)
    left, _, right, bottom = UNIT_BOX
    assert one.getpixel((right - 5, bottom - 5)) == NEVER
    assert one.getpixel((left + 5, bottom - 50)) != NEVER
    assert both.crop((0, 0, *one.size)).tobytes() == one.tobytes()


def test_what_cannot_be_done_is_one_line_and_exit_code_1(run: Path, tmp_path: Path) -> None:
    """A wrong path, a run without units, a glob that matches nothing and a file that cannot be written are told."""
    write_values(tmp_path / "plain", {})
    write_units(tmp_path / "scalars", {0: {}})
    cases = {
        ("nowhere",): "there is no run nowhere",
        ("plain",): "plain holds event files, but nothing that a watch wrote",
        ("scalars",): "scalars tells nothing of units: activations were not watched, or nothing was flushed yet",
        ("run", "--layer", "blcks.0.relu"): "--layer 'blcks.0.relu' matches no layer with units; nearest: "
        "'blocks.0.relu', 'blocks.1.relu'",
        ("run", "--layer", "re:("): "pattern 're:(' is no valid regular expression: ",
        ("run", "--png", "no/such/place.png"): "no/such/place.png cannot be written: ",
    }
    for arguments, words in cases.items():
        result = command("dead", *arguments, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, ""), arguments
        assert result.stderr.startswith(f"instrument: {words}"), result.stderr
        assert result.stderr.count("\n") == 1


def test_a_layer_without_rates_cannot_be_drawn(tmp_path: Path) -> None:
    """Where nothing is known to draw, `--png` says so and writes nothing."""
    write_units(tmp_path / "run", {10: {"a": status("a", [], 10, units=4, verdict="no-data", samples=0)}})
    result = command("dead", "run", "--png", "a.png", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "instrument: there is nothing to draw: no rates are known of a\n"
    assert not (tmp_path / "a.png").exists()
