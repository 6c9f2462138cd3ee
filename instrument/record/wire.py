"""Events in the wire format of protobuf, packed without protobuf's objects.

An object for each of a thousand histograms and five thousand scalars took 40 ms, with the interpreter lock held and
the training thread waiting for it. Here the bytes of all numbers come from NumPy, and what stands before them is
kept for each tag from step to step.

| message | fields, by number |
| --- | --- |
| `Event` | 1 `wall_time` double, 2 `step` int64, 5 `summary` |
| `Summary` | 1 `value`, repeated |
| `Summary.Value` | 1 `tag`, 2 `simple_value` float, 5 `histo` |
| `HistogramProto` | 1 `min`, 2 `max`, 3 `num`, 4 `sum`, 5 `sum_squares` double, 6 `bucket_limit`, 7 `bucket` packed |
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from instrument.measure import native, recycling
from instrument.measure.histogram import FloatArray, IntArray
from instrument.record.events import Part
from instrument.record.statistics import SLICE
from instrument.record.turns import yield_lock
from instrument.record.values import HistogramSlice

__all__ = ["ScalarLayout", "event_parts", "histogram_values"]

_VALUE, _TAG, _SIMPLE_VALUE, _HISTOGRAM = b"\x0a", b"\x0a", b"\x15", b"\x2a"
_LIMITS, _COUNTS = b"\x32", b"\x3a"
_MOMENTS = np.dtype([(name, part) for key in "abcde" for name, part in ((f"{key}_", "u1"), (key, "<f8"))])
"""Five doubles, each behind the byte that says which field it is."""


def event_parts(wall_time: float, step: int, values: Iterable[Part]) -> list[Part]:
    """An event around values, in parts.

    Args:
        wall_time: Seconds since 1970.
        step: Number of the step.
        values: The entries of its summary, as `ScalarLayout` and `histogram_values` give them.

    Returns:
        What makes a serialised `Event`, one behind the other.
    """
    parts = list(values)
    head = struct.pack("<Bd", 0x09, wall_time) + b"\x10" + _varint(step)
    return [head + b"\x2a" + _varint(sum(map(len, parts))), *parts]


@functools.lru_cache(maxsize=4096)
def _varint(number: int) -> bytes:
    """A number from 0 in groups of seven bits, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


class ScalarLayout:
    """The bytes of many scalars, made once for their tags; the numbers are put in for each step.

    Args:
        tags: The tags.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        self.tags = tags
        """The tags."""
        parts: list[bytes] = []
        places = []
        end = 0
        for tag in tags:
            name = tag.encode()
            body = b"".join((_TAG, _varint(len(name)), name, _SIMPLE_VALUE))
            part = b"".join((_VALUE, _varint(len(body) + 4), body, bytes(4)))
            end += len(part)
            places.append(end - 4)
            parts.append(part)
        self._bytes = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
        self._places = np.array(places, np.intp)[:, None] + np.arange(4)

    def values(self, numbers: FloatArray) -> Part:
        """Entries of a summary, one a tag, each with its number as float32."""
        with np.errstate(over="ignore"):  # protobuf makes Inf of what no float32 holds, too
            single = numbers.astype("<f4")
        self._bytes[self._places] = single.view(np.uint8).reshape(-1, 4)
        return recycling.copied(self._bytes)


@functools.lru_cache(maxsize=65_536)
def _tag_field(tag: str) -> bytes:
    name = tag.encode()
    return b"".join((_TAG, _varint(len(name)), name, _HISTOGRAM))


def histogram_values(part: HistogramSlice) -> Part:
    """Entries of a summary, one a histogram.

    Args:
        part: Several histograms.

    Returns:
        A serialised `Summary`.
    """
    moments = np.empty(len(part.tags), _MOMENTS)
    columns = (part.low, part.high, part.num, part.total, part.total_squares)
    for key, number, column in zip("abcde", (0x09, 0x11, 0x19, 0x21, 0x29), columns, strict=True):
        moments[f"{key}_"] = number
        moments[key] = column
    fixed = moments.tobytes()
    fields, field_ends = _tag_fields(part.tags)
    found = native.histogram_entries(fields, field_ends, fixed, part.limits, part.counts, part.ends)
    return found if found is not None else _packed(part, fixed)


@functools.lru_cache(maxsize=16)
def _tag_fields(tags: tuple[str, ...]) -> tuple[bytes, IntArray]:
    """What stands before each histogram, one behind the other, and where each ends; the same from step to step."""
    fields = [_tag_field(tag) for tag in tags]
    return b"".join(fields), np.cumsum([len(field) for field in fields])


def _packed(part: HistogramSlice, fixed: bytes) -> bytes:
    """The same in Python."""
    limits, counts = _bytes_of(part.limits), _bytes_of(part.counts)
    pieces: list[bytes] = []
    start = row = 0
    for number, (tag, end) in enumerate(zip(part.tags, (8 * part.ends).tolist(), strict=True)):
        if number % SLICE == 0:
            yield_lock()
        size = _varint(end - start)
        field = _tag_field(tag)
        length = 45 + 2 * (1 + len(size) + end - start)
        histogram = _varint(length)
        pieces += (
            _VALUE,
            _varint(len(field) + len(histogram) + length),
            field,
            histogram,
            fixed[row : row + 45],
            _LIMITS,
            size,
            limits[start:end],
            _COUNTS,
            size,
            counts[start:end],
        )
        start, row = end, row + 45
    return b"".join(pieces)


def _bytes_of(values: npt.NDArray[np.float64]) -> bytes:
    return values.astype("<f8", copy=False).tobytes()
