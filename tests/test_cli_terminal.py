"""The commands on terminals: narrow ones, coloured ones, pipes, and readings that take their time."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import instrument

CODE = "import instrument.cli as cli; cli.PATIENCE_SECONDS = {patience}; cli.main()"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network with long names, one layer of which goes NaN."""
    logdir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"attention_blocks": blocks})})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(instrument.InstrumentWarning), instrument.watch(
        model, interval=2, scalar_interval=1, logdir=logdir, strict=True
    ):  # fmt: skip
        for step in range(8):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            for number, block in enumerate(blocks):
                x = block(x * float("nan") if (step, number) == (6, 2) else x)
            optimizer.zero_grad()
            x.sum().backward()
            optimizer.step()
    return logdir


def on_terminal(
    arguments: list[str], patience: float = 1e9, stream: str = "stdout", **environment: str
) -> tuple[str, str]:
    """What a command shows on a terminal that one of its streams is, and what it writes to the other, a pipe."""
    leader, follower = pty.openpty()
    pipe = "stderr" if stream == "stdout" else "stdout"
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(patience=patience), *arguments], **{stream: follower, pipe: subprocess.PIPE},
        env={**os.environ, "TERM": "xterm-256color", **environment}, text=True,
    )  # type: ignore[call-overload]  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        shown += part
        if not part:
            break
    os.close(leader)
    _, errors = (process.communicate(timeout=60)) if stream == "stdout" else process.communicate(timeout=60)[::-1]
    return shown.decode(), errors


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("command", [["report", "--full"], ["dead"]])
def test_no_name_and_no_flag_is_lost_on_a_narrow_terminal(run: Path, width: int, command: list[str]) -> None:
    """At any width no line is longer than the terminal, no name is cut, and hidden columns are named."""
    shown, errors = on_terminal([*command, str(run)], COLUMNS=str(width), NO_COLOR="1")
    assert errors == ""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").split("\n")
    assert "…" not in shown
    if command == ["report", "--full"]:
        # `dead` prints its sentences to be copied, so they are left to the terminal to wrap.
        assert max(map(len, lines)) <= width
        assert "non_finite" in "".join(line.strip() for line in lines)
    table = "\n".join(lines).split("Findings")[0]
    first_column = [line.split("  ")[0].strip() for line in table.splitlines() if line.startswith(" ")]
    names = "".join(first_column)
    for number in range(2 if command == ["dead"] else 3):  # what is executed last is not judged
        assert f"encoder.attention_blocks.{number}.1" in names
    if width != 80:  # where it depends on the digits of the numbers
        assert ("hidden for want of room:" in shown) == (width < 80)


def test_colours_are_for_terminals(run: Path) -> None:
    """A terminal is given colours; NO_COLOR takes them away, and a pipe has no control character at all."""
    coloured, _ = on_terminal(["report", str(run)])
    assert "\x1b[1;31m" in coloured  # bold red, for what is critical
    plain, _ = on_terminal(["report", str(run)], NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)
    piped = subprocess.run([sys.executable, "-m", "instrument", "report", str(run)], capture_output=True, text=True)
    assert "\x1b" not in piped.stdout
    assert "CRIT" in piped.stdout


@pytest.mark.parametrize(
    ("command", "title"), [("report", "reading"), ("dead", "reading"), ("check", "checking"), ("compare", "reading")]
)
def test_long_reading_shows_how_far_it_is(run: Path, command: str, title: str) -> None:
    """Reading past the patience shows a bar on the error stream and takes it away; shorter reading shows nothing."""
    arguments = [command, str(run)] + [str(run)] * (command == "compare")
    shown, output = on_terminal(arguments, patience=0.0, stream="stderr")
    assert title in shown
    assert re.search(r"\d/[\d.]+ [kM]B", shown)
    assert "\x1b[2K" in shown  # the line is wiped
    assert title not in output
    shown, again = on_terminal(arguments, stream="stderr")
    assert (shown, again) == ("", output)
