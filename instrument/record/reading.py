"""Reading a run back: the scalars of ours in its event files, tag by tag and step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tensorboard.compat.proto.event_pb2 import Event

from instrument.errors import RunError
from instrument.record.events import Damage, scan
from instrument.record.runs import event_files
from instrument.record.tags import Tag, parse_tag

__all__ = ["Scalars", "read_scalars"]

Scalars: TypeAlias = "dict[Tag, dict[int, float]]"
"""Value by step, by tag; steps rise."""


def read_scalars(logdir: Path, progress: Callable[[int], None] | None = None) -> Scalars:
    """Read the scalars that a watch wrote; later files of a run win where steps meet.

    A torn or damaged file is read up to where it is whole, as TensorBoard does.

    Args:
        logdir: Directory of event files, as `instrument.record.runs.resolve_run` finds it.
        progress: Called with the number of bytes read since the last call.

    Returns:
        Value by step, by tag.

    Raises:
        RunError: The files cannot be read, or hold no scalar of ours.
    """
    scalars: Scalars = {}
    parsed: dict[str, Tag | None] = {}
    try:
        for path in event_files(logdir):
            for data in scan(path):
                if isinstance(data, Damage):
                    break
                if progress is not None:
                    progress(len(data))
                event = Event.FromString(data)
                for value in event.summary.value:
                    if value.WhichOneof("value") != "simple_value":
                        continue
                    tag = (
                        parsed[value.tag] if value.tag in parsed else parsed.setdefault(value.tag, parse_tag(value.tag))
                    )
                    if tag is not None and tag.statistic is not None:
                        scalars.setdefault(tag, {})[event.step] = value.simple_value
    except OSError as error:
        raise RunError(f"run {logdir} cannot be read: {error}") from error
    if not scalars:
        raise RunError(f"{logdir} holds event files, but nothing that a watch wrote")
    return {tag: dict(sorted(values.items())) for tag, values in scalars.items()}
