"""Documents: what a run tells about itself besides numbers, kept in its event files for the commands to read.

A document is JSON, compressed, in a tensor of a plugin that TensorBoard does not have, so that no tab shows it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

__all__ = ["PLUGIN", "UNITS_TAG", "WATCH_TAG", "content_of", "document"]

PLUGIN = "instrument"
WATCH_TAG = "instrument/watch"
"""Of the watch itself: its thresholds, what it could not observe, what its parameters are."""

UNITS_TAG = "instrument/units"
"""Of the units of every module, at one step."""


def document(tag: str, content: Any) -> Summary.Value:
    """A document, as a value of an event.

    Args:
        tag: `WATCH_TAG` or `UNITS_TAG`.
        content: Anything that JSON can hold.

    Returns:
        The value.

    Example:
        >>> content_of(document(WATCH_TAG, {"notices": []}))
        {'notices': []}
    """
    data = zlib.compress(json.dumps(content, separators=(",", ":")).encode())
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN)),
        tensor=TensorProto(dtype=DT_STRING, string_val=[data]),
    )


def content_of(value: Summary.Value) -> Any:
    """What `document` was given.

    Raises:
        ValueError: The value holds no document.
    """
    if not value.tensor.string_val:
        raise ValueError(f"{value.tag} holds no document")
    try:
        return json.loads(zlib.decompress(value.tensor.string_val[0]))
    except zlib.error as error:
        raise ValueError(f"{value.tag} holds no document: {error}") from error
