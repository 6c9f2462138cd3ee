"""Run directories: made so that no two processes ever share one, and found again by the commands."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path

from instrument.errors import RunError

__all__ = ["EVENT_FILE_PART", "LOGS", "event_files", "find_runs", "make_run_directory", "resolve_run"]

LOGS = Path("logs") / "tensorboard"
"""Where the event files of a run lie inside its directory."""

EVENT_FILE_PART = "tfevents"
"""What the name of a file must contain for TensorBoard to read it."""

_RUN_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})_(\d+)")
_ATTEMPTS = 10_000


def make_run_directory(runs_directory: str | os.PathLike[str], today: datetime.date | None = None) -> Path:
    """Make the directory of a new run, ``{runs}/2026-02-10_001/logs/tensorboard``.

    The number is one above the highest of the day. Making the directory is the claim to it, so processes that
    start together get different ones.

    Args:
        runs_directory: Made where it does not exist.
        today: The day in the name; today where not given.

    Returns:
        The ``logs/tensorboard`` inside the run directory.

    Raises:
        RunError: The directory cannot be made.
    """
    root = Path(runs_directory)
    day = (today or datetime.date.today()).isoformat()
    try:
        root.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            run = root / f"{day}_{_highest_number(root, day) + 1:03d}"
            try:
                run.mkdir()
            except FileExistsError:
                continue
            logs = run / LOGS
            logs.mkdir(parents=True)
            return logs
    except OSError as error:
        raise RunError(f"no run directory can be made under {root}: {error}") from error
    raise RunError(f"no run directory can be made under {root}: another process took each of {_ATTEMPTS} names")


def _highest_number(root: Path, day: str) -> int:
    found = (_RUN_NAME.fullmatch(path.name) for path in root.iterdir())
    return max((int(match[2]) for match in found if match and match[1] == day), default=0)


def event_files(logdir: Path) -> list[Path]:
    """The event files directly in a directory, in the order in which they were begun."""
    return sorted(path for path in logdir.iterdir() if EVENT_FILE_PART in path.name and path.is_file())


def resolve_run(run: str | os.PathLike[str]) -> Path:
    """The directory with the event files of a run.

    Args:
        run: The run directory, or the ``logs/tensorboard`` inside it, or any directory with event files.

    Returns:
        The directory that holds event files.

    Raises:
        RunError: There is no such directory, or it holds no event file; runs below it are named.

    Example:
        >>> resolve_run("no/such/run")
        Traceback (most recent call last):
        ...
        instrument.errors.RunError: there is no run no/such/run
    """
    path = Path(run)
    if not path.exists():
        raise RunError(f"there is no run {path}")
    if not path.is_dir():
        raise RunError(f"{path} is a file; give the run directory it lies in")
    try:
        for candidate in (path, path / LOGS):
            if candidate.is_dir() and event_files(candidate):
                return candidate
        below = [name for name, _ in find_runs(path)]
    except OSError as error:
        raise RunError(f"run {path} cannot be read: {error}") from error
    if below:
        raise RunError(f"{path} is no run but holds {len(below)}; the newest is {path / below[-1]}")
    raise RunError(f"{path} holds no event files")


def find_runs(root: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """Every directory with event files at or below a directory, with the name by which people know the run.

    Args:
        root: Where to look.

    Yields:
        Name relative to the root, without ``logs/tensorboard``, and directory; in the order of names.
    """
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        subdirectories.sort()
        if any(EVENT_FILE_PART in name for name in files):
            relative = Path(directory).relative_to(root)
            parts = relative.parts
            if parts[-len(LOGS.parts) :] == LOGS.parts:
                parts = parts[: -len(LOGS.parts)]
            yield "/".join(parts) or Path(root).resolve().name, Path(directory)
