"""Event files: framing records, and reading them back fast.

A file is a sequence of records: u64 length, masked CRC-32C of the length, data, masked CRC-32C of the data, little
endian; the data is an `Event`. TensorBoard computes CRC-32C in pure Python, 160 ns a byte with the interpreter
lock held; `google-crc32c` takes 0.1. `EventAccumulator` reads 88 MB in 23 s, the scan below in well under a second.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["Damage", "FileCheck", "Part", "check_file", "framed", "read_events", "scan"]

Part: TypeAlias = "bytes | npt.NDArray[np.uint8]"
"""Bytes of an event; an array, of shape (n,), is not copied once more."""

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def framed(*parts: Part) -> tuple[Part, ...]:
    """A record of an event file around data, in parts, since an event of megabytes need not be copied.

    Args:
        parts: A serialised `Event`, in as many parts as it was made of.

    Returns:
        Length and checksum, the data, checksum.
    """
    length = struct.pack("<Q", sum(map(len, parts)))
    return length + _FOOTER.pack(_masked_crc(length)), *parts, _FOOTER.pack(_masked_crc(*parts))


def _masked_crc(*parts: Part) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, as the format asks."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Damage:
    """Where an event file stops being readable, and why."""

    offset: int
    """Byte at which the first bad record begins."""

    reason: str


def scan(path: Path) -> Iterator[bytes | Damage]:
    """Walk through the records of an event file, verifying every checksum.

    Args:
        path: The file.

    Yields:
        The data of each record; a `Damage` last, where the file is torn or damaged.
    """
    offset = 0
    with path.open("rb") as file:
        while True:
            header = file.read(_HEADER.size)
            if not header:
                return
            if len(header) < _HEADER.size:
                yield Damage(offset, f"the last record is cut within its header ({len(header)} bytes)")
                return
            length, length_crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != length_crc:
                yield Damage(offset, "the length of a record does not agree with its checksum")
                return
            data = file.read(length)
            footer = file.read(_FOOTER.size)
            if len(data) < length or len(footer) < _FOOTER.size:
                yield Damage(offset, f"the last record is cut after {len(data)} of {length} bytes")
                return
            if _masked_crc(data) != _FOOTER.unpack(footer)[0]:
                yield Damage(offset, "the data of a record does not agree with its checksum")
                return
            yield data
            offset += _HEADER.size + length + _FOOTER.size


def read_events(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[Any]:
    """The events of a file, up to where it is whole.

    Args:
        path: The file.
        progress: Called with the number of bytes read since the last call.

    Yields:
        Each `Event`; a `Damage` last, where the file is torn or damaged.
    """
    offset = 0
    for data in scan(path):
        if isinstance(data, Damage):
            yield data
            return
        try:
            event = Event.FromString(data)
        except DecodeError:
            yield Damage(offset, "a record with a right checksum holds no event")
            return
        yield event
        size = _HEADER.size + len(data) + _FOOTER.size
        offset += size
        if progress is not None:
            progress(size)


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """What a check of one event file found."""

    path: Path
    size: int
    """Bytes in the file."""
    records: int
    """Whole records, the header among them."""
    last_step: int | None
    """Step of the last record with values; None where there is none."""
    damage: Damage | None

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def check_file(path: Path, progress: Callable[[int], None] | None = None) -> FileCheck:
    """Read an event file with every checksum.

    Args:
        path: The file.
        progress: Called with the number of bytes read since the last call.

    Returns:
        What was found; damage where the file is torn, cut or altered.
    """
    records, last_step = 0, None
    for event in read_events(path, progress):
        if isinstance(event, Damage):
            return FileCheck(path, path.stat().st_size, records, last_step, event)
        records += 1
        if event.HasField("summary"):
            last_step = event.step
    return FileCheck(path, path.stat().st_size, records, last_step, None)
