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
from typing import Any

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["Damage", "FileCheck", "check_file", "frame", "scan"]

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def frame(data: bytes) -> bytes:
    """A record of an event file around data.

    Args:
        data: A serialised `Event`.

    Returns:
        Length, checksum, data, checksum.
    """
    length = struct.pack("<Q", len(data))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), data, _FOOTER.pack(_masked_crc(data))))


def _masked_crc(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, as the format asks."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Damage:
    """Where an event file stops being readable, and why."""

    offset: int
    """Byte at which the first bad record begins."""

    reason: str


def scan(path: Path, check: bool = False) -> Iterator[bytes | Damage]:
    """Walk through the records of an event file.

    Args:
        path: The file.
        check: Whether the checksums of the data are verified too; those of the lengths always are.

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
            if check and _masked_crc(data) != _FOOTER.unpack(footer)[0]:
                yield Damage(offset, "the data of a record does not agree with its checksum")
                return
            yield data
            offset += _HEADER.size + length + _FOOTER.size


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
    for data in scan(path, check=True):
        if isinstance(data, Damage):
            return FileCheck(path, path.stat().st_size, records, last_step, data)
        records += 1
        event = Event.FromString(data)
        if event.HasField("summary"):
            last_step = event.step
        if progress is not None:
            progress(len(data))
    return FileCheck(path, path.stat().st_size, records, last_step, None)
