"""Reading a run back: the scalars of ours in its event files, tag by tag or step by step, and its documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from instrument.errors import RunError
from instrument.record.documents import data_of
from instrument.record.events import Damage, read_events
from instrument.record.losses import Losses
from instrument.record.runs import event_files
from instrument.record.tags import Tag, parse_tag

__all__ = ["Scalars", "StepContents", "read_scalars", "read_steps"]

Scalars: TypeAlias = "dict[Tag, dict[int, float]]"
"""Value by step, by tag; steps rise."""


def read_scalars(
    logdir: Path, progress: Callable[[int], None] | None = None, damages: list[str] | None = None
) -> Scalars:
    """Read the scalars that a watch wrote; later files of a run win where steps meet.

    A torn or damaged file is read up to where it is whole, as TensorBoard does.

    Args:
        logdir: Directory of event files, as `instrument.record.runs.resolve_run` finds it.
        progress: Called with the number of bytes read since the last call.
        damages: What files are torn or damaged, and where, is added here.

    Returns:
        Value by step, by tag.

    Raises:
        RunError: The files cannot be read, or hold no scalar of ours.
    """
    scalars: Scalars = {}
    parsed: dict[str, Tag | None] = {}
    damages = damages if damages is not None else []
    for event in _events(logdir, progress, damages):
        for value in event.summary.value:
            if value.WhichOneof("value") != "simple_value":
                continue
            tag = parsed[value.tag] if value.tag in parsed else parsed.setdefault(value.tag, parse_tag(value.tag))
            if tag is not None and tag.statistic is not None:
                scalars.setdefault(tag, {})[event.step] = value.simple_value
    if not scalars:
        raise _nothing_of_ours(logdir, damages)
    return {tag: dict(sorted(values.items())) for tag, values in scalars.items()}


@dataclasses.dataclass
class StepContents:
    """What a watch wrote of one step."""

    step: int
    scalars: dict[Tag, float] = dataclasses.field(default_factory=dict)
    """In the order in which they were written, which is that of execution."""
    documents: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """By tag; what they hold."""
    loss: float | None = None
    """The training loss of the step or before it, where one was logged since the step before."""


def read_steps(
    logdir: Path, progress: Callable[[int], None] | None = None, damages: list[str] | None = None
) -> Iterator[StepContents]:
    """Read what a watch wrote, one step after another, so that a long run needs no more memory than a short one.

    Args:
        logdir: Directory of event files.
        progress: Called with the number of bytes read since the last call.
        damages: What files are torn or damaged, and where, is added here.

    Yields:
        The contents of each step; a run that was resumed goes back to an earlier step, and what came after that
        is void.

    Raises:
        RunError: The files cannot be read, or hold nothing of ours.
    """
    parsed: dict[str, Tag | None] = {}
    losses = Losses()
    damages = damages if damages is not None else []
    contents: StepContents | None = None
    before: int | None = None
    for event in _events(logdir, progress, damages):
        for value in event.summary.value:
            data: bytes | None = None
            if value.WhichOneof("value") == "simple_value":
                tag = parsed[value.tag] if value.tag in parsed else parsed.setdefault(value.tag, parse_tag(value.tag))
                if tag is None:
                    losses.add(value.tag, event.step, value.simple_value)
                    continue
            else:
                data = data_of(value)
                if data is None:
                    continue
            if contents is None or contents.step != event.step:
                if contents is not None:
                    yield _with_loss(contents, losses, before)
                    before = contents.step
                contents = StepContents(event.step)
            if data is not None:
                contents.documents[value.tag] = data
            elif tag is not None and tag.statistic is not None:
                contents.scalars[tag] = value.simple_value
    if contents is None:
        raise _nothing_of_ours(logdir, damages)
    yield _with_loss(contents, losses, before)


def _with_loss(contents: StepContents, losses: Losses, before: int | None) -> StepContents:
    contents.loss = losses.at(contents.step, before)
    return contents


def _nothing_of_ours(logdir: Path, damages: Iterable[str]) -> RunError:
    return RunError("; ".join([f"{logdir} holds event files, but nothing that a watch wrote", *damages]))


def _events(logdir: Path, progress: Callable[[int], None] | None, damages: list[str]) -> Iterator[Any]:
    """The events of all files of a run, each file up to where it is whole."""
    try:
        for path in event_files(logdir):
            for event in read_events(path, progress):
                if isinstance(event, Damage):
                    damages.append(
                        f"{path.name} is damaged at byte {event.offset}: {event.reason}; it is read up to there"
                    )
                else:
                    yield event
    except OSError as error:
        raise RunError(f"run {logdir} cannot be read: {error}") from error
