"""The examples run as a person starts them, with few steps, and print what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .training import read_back

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_char_gpt_trains_on_a_text_and_shows_what_the_watch_saw(tmp_path: Path) -> None:
    """The demo ends with the run directory, the table and the command that opens TensorBoard; its run is whole."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    out = run("char_gpt", "--steps", "12", "--batch", "4", "--interval", "5", "--text", "text.txt", cwd=tmp_path)
    assert "blocks.0.sa.key.weight" in out
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


def test_the_ten_lines_of_the_readme_print_what_it_shows(tmp_path: Path) -> None:
    """The README's ten lines run as they stand and print the tables below them, to the digits of this machine."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    code, shown = readme.split("```python\n", 1)[1].split("```\n\nprints\n\n```\n", 1)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

    def first_words(text: str) -> list[str]:
        return [line.split()[0] for line in text.splitlines() if line.strip()]

    expected = first_words(shown.split("```", 1)[0])
    assert len(expected) > 15
    assert [word.strip("─") for word in first_words(result.stdout)] == [word.strip("─") for word in expected]
