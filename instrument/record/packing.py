"""The sketches of one step: loose while they are worked on, packed while they are kept.

A history of 64 records holds 64 sketches of each site: as arrays and objects they took 3 kB each, which is 200 kB a
site. Packed they take a few hundred bytes. Codes rise, so that their differences are small, and most counts are a few:
where C is at hand, it writes each in as many half bytes as it needs, a seventh of what they take. `zlib` makes a tenth,
in ten times the time.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from instrument.measure import native
from instrument.measure.columns import Sketches
from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.pending import PLACES, Pending, Source, gathered
from instrument.measure.sketch import Sketch
from instrument.record.statistics import statistics_of
from instrument.record.turns import yield_lock

__all__ = ["BYTES_PER_SKETCH", "PART", "SketchStore"]

_LEVEL = 1
"""Of `zlib`: the fastest; the next ones are slower by half and save a twentieth."""

BYTES_PER_SKETCH = 1024
"""Memory of a sketch that waits to be written, roughly, without the values that it is to be made of: the records of
4096 steps of 16 small tensors took 36 MiB with all that stands around them."""

PART = 128
"""Sketches of a part: whoever reads one unpacks them all."""

_CACHED = 4
"""Parts that are kept unpacked, of all records together: whoever reads one sketch reads those beside it."""


_Loose: TypeAlias = "tuple[dict[str, int | Sketch | Pending], Sequence[Source]]"
"""Tag to sketch or what will give it, or to its place in the sources."""


class SketchStore(Mapping[str, "Sketch"]):
    """Sketches by tag; records of one step share it.

    Args:
        sketches: Tag to sketch, to what will give it when it is read, or to its place in a source, as in `gathered`.
        sources: The sources.

    Example:
        >>> import torch
        >>> from instrument import measure
        >>> store = SketchStore({"Gradients/weight": measure(torch.tensor([1.0, 3.0]))})
        >>> store.pack()
        >>> store["Gradients/weight"].mean
        2.0
    """

    __slots__ = ("_loose", "_packed", "_places", "_sketches", "_statistics", "tags")

    def __init__(self, sketches: Mapping[str, int | Sketch | Pending], sources: Sequence[Source] = ()) -> None:
        self._places, self.tags = _places_of(tuple(sketches))
        # Both in one attribute: another thread may be making columns of them while one is read.
        self._loose: _Loose | None = dict(sketches), sources
        self._sketches: Sketches | None = None
        self._packed: _Packed | None = None
        self._statistics: FloatArray | None = None

    def __getitem__(self, tag: str) -> Sketch:
        held, sketches = self._loose, self._sketches  # another thread may be packing
        if held is not None:
            loose, sources = held
            found = _item(loose[tag], sources)
            if not isinstance(found, Sketch):
                found = loose[tag] = found.sketch()
            return found
        place = self._places[tag]
        if sketches is not None:
            return sketches[place]
        assert self._packed is not None
        return self._packed[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, tag: object) -> bool:
        held = self._loose
        return tag in (held[0] if held is not None else self._places)

    def as_they_are(self) -> dict[str, Sketch | Pending]:
        """Tag to sketch, or to what will give it, where nobody has read it yet."""
        held = self._loose
        if held is None:
            return dict(self.items())
        loose, sources = held
        return {tag: _item(found, sources) for tag, found in list(loose.items())}

    def columns(self) -> Sketches:
        """All sketches, in the order of the tags; they stay so until they are packed."""
        held, sketches = self._loose, self._sketches  # in this order: another thread may be doing the same
        if sketches is not None:
            return sketches
        if held is None:
            assert self._packed is not None
            return self._packed.unpacked()
        loose, sources = held
        sketches = gathered(list(loose.values()), sources)
        self._sketches = sketches
        self._loose = None
        if self._packed is not None:
            self._sketches = None
        return sketches

    def statistics(self) -> FloatArray:
        """The statistics of all sketches, worked out once; see `statistics_of`.

        Returns:
            Float64 of shape (sketches, `COLUMNS`), in the order of the tags.
        """
        if self._statistics is None:
            self._statistics = statistics_of(self.columns())
        return self._statistics

    @property
    def held(self) -> int:
        """Bytes of memory until the sketches are packed, roughly."""
        loose = self._loose
        return BYTES_PER_SKETCH * len(self) + (sum(source.held for source in loose[1]) if loose is not None else 0)

    def pack(self) -> None:
        """Keep the sketches in little memory from now on; each is unpacked when it is read."""
        if self._packed is None:
            self._packed = _Packed(self.columns())
            self._sketches = None


def _item(found: int | Sketch | Pending, sources: Sequence[Source]) -> Sketch | Pending:
    return sources[found // PLACES].item(found % PLACES) if isinstance(found, int) else found


@functools.lru_cache(maxsize=8)
def _places_of(tags: tuple[str, ...]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The place of each tag, and the tags; the same come again each step, and share both."""
    return {tag: place for place, tag in enumerate(tags)}, tags


class _Packed:
    """Sketches in parts of `PART`."""

    __slots__ = ("_numbers", "_parts")

    def __init__(self, sketches: Sketches) -> None:
        self._numbers = sketches.numbers.copy()
        self._parts = _packed(sketches)

    def __getitem__(self, place: int) -> Sketch:
        return self._part(place // PART)[place % PART]

    def unpacked(self) -> Sketches:
        """All of them."""
        return Sketches.joined([self._part(number) for number in range(len(self._parts))])

    def _part(self, number: int) -> Sketches:
        start = number * PART
        return Sketches(*_unpacked(self._parts[number]), self._numbers[start : start + PART])


_HEADER = 2
_IN_HALVES, _IN_ZLIB = b"h", b"z"
"""What a part was packed by."""


def _packed(sketches: Sketches) -> list[bytes]:
    """Codes and counts of sketches, part by part."""
    if native.is_there():  # which gives the interpreter lock up by itself
        return [_IN_HALVES + part for part in native.packed(sketches, PART)]
    parts = []
    for start in range(0, len(sketches), PART):
        yield_lock()
        parts.append(_in_zlib(sketches.part(start, min(start + PART, len(sketches)))))
    return parts


def _in_zlib(sketches: Sketches) -> bytes:
    """Codes and counts of several sketches.

    Of what `zlib` packs, a header of two numbers says how many sketches there are and how many bytes a count has;
    behind it stand the ends of the sketches, the differences of the codes, and the counts, the last two byte by byte of
    like weight.
    """
    every = sketches.counts
    width = next(width for width in (1, 2, 4, 8) if not every.size or every.max() < 1 << (8 * width - (width == 8)))
    steps = sketches.codes.copy()
    steps[1:] -= sketches.codes[:-1]  # modulo 65,536 where a sketch begins
    body = b"".join(
        (
            np.array([len(sketches), width], np.uint32).tobytes(),
            sketches.ends.astype(np.uint32).tobytes(),
            _planes(steps, 2),
            _planes(every.astype(f"<u{width}"), width),
        )
    )
    return _IN_ZLIB + zlib.compress(body, _LEVEL)


def _planes(values: npt.NDArray[np.unsignedinteger], width: int) -> bytes:
    """The lowest bytes of all values, then the next ones: those alike stand together, which packs better."""
    planes: bytes = values.view(np.uint8).reshape(-1, width).T.tobytes()
    return planes


@functools.lru_cache(maxsize=_CACHED)
def _unpacked(packed: bytes) -> tuple[npt.NDArray[np.uint16], IntArray, IntArray]:
    """Codes and counts of several sketches, and where each ends."""
    if packed[:1] == _IN_HALVES:
        return native.unpacked(packed[1:])
    body = np.frombuffer(zlib.decompress(packed[1:]), np.uint8)
    number, width = body[: 4 * _HEADER].view(np.uint32).tolist()
    start = 4 * (_HEADER + number)
    ends = body[4 * _HEADER : start].view(np.uint32).astype(np.int64)
    size = int(ends[-1])
    steps = body[start : start + 2 * size].reshape(2, size).T.copy().view(np.uint16).ravel()
    counts = body[start + 2 * size :].reshape(width, size).T.copy().view(f"<u{width}").ravel()
    return np.cumsum(steps, dtype=np.uint16), counts.astype(np.int64), ends
