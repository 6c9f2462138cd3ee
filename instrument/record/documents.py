"""Documents: what a run tells about itself besides numbers, kept in its event files for the commands to read.

A document is compressed JSON in a tensor of a plugin that TensorBoard does not have, so that no tab shows it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from instrument.errors import RunError

__all__ = ["PLUGIN", "UNITS_TAG", "WATCH_TAG", "data_of", "document", "packed", "unpacked"]

PLUGIN = "instrument"
WATCH_TAG = "instrument/watch"
"""Of the watch itself: its thresholds, what it could not observe, what its parameters are."""

UNITS_TAG = "instrument/units"
"""Of the units of every module, at one step."""


def document(tag: str, data: bytes) -> Summary.Value:
    """A document, as a value of an event.

    Args:
        tag: `WATCH_TAG` or `UNITS_TAG`.
        data: What it holds.

    Returns:
        The value.

    Example:
        >>> data_of(document(WATCH_TAG, packed({"notices": []}))) == packed({"notices": []})
        True
    """
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN)),
        tensor=TensorProto(dtype=DT_STRING, string_val=[data]),
    )


def data_of(value: Summary.Value) -> bytes | None:
    """What `document` was given; None where a value is no document."""
    is_document = value.metadata.plugin_data.plugin_name == PLUGIN and len(value.tensor.string_val) == 1
    return bytes(value.tensor.string_val[0]) if is_document else None


def packed(content: Any) -> bytes:
    """Anything that JSON can hold, compressed."""
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode())


def unpacked(data: bytes) -> Any:
    """What `packed` was given.

    Raises:
        RunError: The data are something else.
    """
    try:
        return json.loads(zlib.decompress(data))
    except (zlib.error, ValueError) as error:
        raise RunError(f"a document of the run cannot be read: {error}") from error
