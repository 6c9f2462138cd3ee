"""The examples run as a person starts them, with few steps, and print what they promise."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .training import read_back

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What an example without arguments prints; each runs once."""
    return functools.cache(lambda name: run(name, cwd=tmp_path_factory.mktemp(name)))


def test_char_gpt_trains_on_a_text_and_shows_what_the_watch_saw(tmp_path: Path) -> None:
    """The demo ends with the run directory, the table and the command that opens TensorBoard; its run is whole."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    out = run("char_gpt", "--steps", "12", "--batch", "4", "--interval", "5", "--text", "text.txt", cwd=tmp_path)
    assert "blocks.0.sa.key" in out
    assert "instrument tensorboard runs/" in out
    (logdir,) = tmp_path.glob("runs/*/logs/tensorboard")
    assert f"run:  {logdir.relative_to(tmp_path)}" in out
    histograms, scalars = read_back(logdir)
    assert histograms["Activations/blocks.0.ffwd.net.0"] == [0, 5, 10]
    assert histograms["Parameters/token_embedding_table.weight"] == [0, 5, 10, 11]
    assert histograms["Gradients/lm_head.weight"] == [0, 5, 10, 11]
    assert list(scalars["loss/train"]) == list(range(12))
    assert list(scalars["loss/held_out"]) == [0, 11]


def test_char_gpt_reads_the_standard_library(tmp_path: Path) -> None:
    """Without a text the demo learns from Python's own sources; an interval of 0 watches nothing."""
    out = run("char_gpt", "--steps", "2", "--batch", "2", "--interval", "0", cwd=tmp_path)
    assert "nothing has been recorded yet" in out
    assert not (tmp_path / "runs").exists()


def test_by_hand_is_the_loop_of_the_original_document(tmp_path: Path) -> None:
    """The loop by hand logs at the configured interval and names its run."""
    out = run("by_hand", "--steps", "201", cwd=tmp_path)
    assert "step 200: loss" in out
    (logdir,) = tmp_path.glob("runs/*/logs/tensorboard")
    assert f"run: {logdir.relative_to(tmp_path)}" in out
    assert read_back(logdir)[0]["Activations/layer1_output"] == [0, 100, 200]


def test_dead_relu_names_the_dead_units_and_compares(printed: Callable[[str], str]) -> None:
    """The hot run has more than a tenth of its units dead, the cool one less; the comparison says where they part."""
    out = printed("dead_relu")
    hot, cool, comparison = re.split("^--- .*$", out, flags=re.MULTILINE)[1:]
    shares = [
        sum(int(count) for count in re.findall(r"^[13]: (\d+) of 128 units dead", text, re.MULTILINE)) / 256
        for text in (hot, cool)
    ]
    assert shares[0] > 0.3
    assert shares[1] < 0.1
    assert "dead_units" in hot
    assert "dead_units" not in cool
    assert "The runs part at step 0" in comparison


def test_find_the_nan_names_the_layer_it_began_in(printed: Callable[[str], str]) -> None:
    """The first offender is the division, and the steps before it are shown."""
    out = printed("find_the_nan")
    step = re.search(r"^the loss is nan at step (\d+)$", out, re.MULTILINE)
    assert step is not None
    assert f"It began in the activations of standardize at step {step[1]}. The steps before:" in out
    assert len(re.findall(r"^  step \d+: \d+ % zeros in act, 0 NaN", out, re.MULTILINE)) >= 3


def test_vanishing_finds_the_sigmoids_and_nothing_in_their_twins(printed: Callable[[str], str]) -> None:
    """The deep network of sigmoids is told that its gradient vanishes and does not learn; its twins are well and do."""
    out = printed("vanishing")
    sigmoid, relu, residual = re.split("^--- ", out.split("rms of the gradients")[0], flags=re.MULTILINE)[1:]
    losses = [float(text.split("loss ")[1].split()[0]) for text in (sigmoid, relu, residual)]
    assert losses[0] > 0.6
    assert max(losses[1:]) < 0.1
    assert "the gradient vanishes on its way back" in sigmoid
    assert all(level not in text for level in ("CRIT", "WARN") for text in (relu, residual))
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+( +\S+){3}$", line)]
    assert len(rows) == 14
    assert float(rows[0][1]) < 1e-6 * float(rows[-1][1])
    assert float(rows[0][3]) > 1e-3 * float(rows[-1][3])


ILLNESSES = ["dead_relu", "find_the_nan", "vanishing"]


@pytest.mark.parametrize("name", ILLNESSES)
def test_the_gallery_shows_what_the_examples_print(name: str, printed: Callable[[str], str]) -> None:
    """Each line of a page that holds no number, which may be another on another machine, is a line of the output."""
    page = EXAMPLES / "gallery" / f"{name}.md"
    assert f"](examples/gallery/{page.name})" in (EXAMPLES.parent / "README.md").read_text()
    text = page.read_text()
    assert all((page.parent / picture).is_file() for picture in re.findall(r"!\[[^]]*]\(([^)]+)\)", text))
    shown = text.split("prints\n\n```\n")[1].split("\n```")[0].splitlines()
    lines = [" ".join(line.strip(" ─").split()) for line in shown if not re.search(r"\d", line)]
    found = {" ".join(line.strip(" ─").split()) for line in printed(name).splitlines()}
    headings = [line for line in lines if line.startswith(("layer ", "Health", "Findings", "---", "rms of", "none"))]
    assert len(headings) >= 2 - (name == "vanishing")
    assert set(headings) <= found


@pytest.mark.parametrize("name", ILLNESSES)
def test_examples_of_illnesses_are_short(name: str) -> None:
    """Each can be read on one screen or two: fewer than 80 lines."""
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_dead_relu_says_what_it_needs(tmp_path: Path) -> None:
    """Without scikit-learn the example ends with one line that says what to install."""
    (tmp_path / "sklearn.py").write_text("raise ImportError")
    command = [sys.executable, str(EXAMPLES / "dead_relu.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "this example learns scikit-learn's digits: pip install scikit-learn\n"


def test_the_ten_lines_of_the_readme_print_what_it_shows(tmp_path: Path) -> None:
    """The README's ten lines run as they stand and print the tables below them, to the digits of this machine."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    code, shown = readme.split("```python\n", 1)[1].split("```\n\nprints\n\n```\n", 1)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

    def first_words(text: str) -> list[str]:
        return [line.split()[0] for line in text.splitlines() if line.strip()]

    expected = first_words(shown.split("```", 1)[0])
    assert len(expected) > 6
    assert [word.strip("─") for word in first_words(result.stdout)] == [word.strip("─") for word in expected]
