"""The sketches of one step: loose while they are worked on, packed while they are kept.

A history of 64 records holds 64 sketches of each site: as arrays and objects they took 3 kB each, which is 200 kB a
site. Packed they take a few hundred bytes. Codes rise, so that their differences are small, and most counts are a few:
`zlib` makes a tenth of both, and it gives up the interpreter lock while it works.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from instrument.measure.histogram import FloatArray, IntArray
from instrument.measure.pending import Pending
from instrument.measure.sketch import Sketch
from instrument.record.statistics import SLICE, statistics_of, yield_lock

__all__ = ["SketchStore"]

_LEVEL = 1
"""Of `zlib`: the fastest; the next ones are slower by half and save a twentieth."""

_CACHED = 4
"""Parts that are kept unpacked, of all records together: whoever reads one sketch reads those beside it."""


class SketchStore(Mapping[str, "Sketch"]):
    """Sketches by tag; records of one step share it.

    Args:
        sketches: Tag to sketch, or to what will give it when it is read.

    Example:
        >>> import torch
        >>> from instrument import measure
        >>> store = SketchStore({"Gradients/weight": measure(torch.tensor([1.0, 3.0]))})
        >>> store.pack()
        >>> store["Gradients/weight"].mean
        2.0
    """

    __slots__ = ("_loose", "_packed", "_statistics")

    def __init__(self, sketches: Mapping[str, Sketch | Pending]) -> None:
        self._loose: dict[str, Sketch | Pending] | None = dict(sketches)
        self._packed: _Packed | None = None
        self._statistics: FloatArray | None = None

    def __getitem__(self, tag: str) -> Sketch:
        loose = self._loose  # another thread may be packing
        if loose is None:
            assert self._packed is not None
            return self._packed[tag]
        found = loose[tag]
        if not isinstance(found, Sketch):
            found = loose[tag] = found.sketch()
        return found

    def __iter__(self) -> Iterator[str]:
        loose = self._loose
        if loose is None:
            assert self._packed is not None
            return iter(self._packed.places)
        return iter(loose)

    def __len__(self) -> int:
        loose = self._loose
        if loose is None:
            assert self._packed is not None
            return len(self._packed.places)
        return len(loose)

    def __contains__(self, tag: object) -> bool:
        loose = self._loose
        if loose is None:
            assert self._packed is not None
            return tag in self._packed.places
        return tag in loose

    def as_they_are(self) -> dict[str, Sketch | Pending]:
        """Tag to sketch, or to what will give it, where nobody has read it yet."""
        loose = self._loose
        return dict(loose) if loose is not None else dict(self.items())

    def statistics(self) -> FloatArray:
        """The statistics of all sketches, worked out once; see `statistics_of`.

        Returns:
            Float64 of shape (sketches, `COLUMNS`), in the order of the tags.
        """
        if self._statistics is None:
            sketches = iter(self.values())
            parts = []
            for _ in range(0, len(self), SLICE):
                yield_lock()
                parts.append(statistics_of(itertools.islice(sketches, SLICE)))
            self._statistics = np.concatenate(parts) if parts else statistics_of(())
        return self._statistics

    def pack(self) -> None:
        """Keep the sketches in little memory from now on; each is unpacked when it is read."""
        if self._loose is not None:
            self._packed = _Packed(tuple(self), list(self.values()))
            self._loose = None


@functools.lru_cache(maxsize=8)
def _places_of(tags: tuple[str, ...]) -> dict[str, int]:
    """The place of each tag; the same tags come again each step, and share it."""
    return {tag: place for place, tag in enumerate(tags)}


class _Packed:
    """Sketches in parts of `SLICE`."""

    __slots__ = ("_numbers", "_parts", "places")

    def __init__(self, tags: tuple[str, ...], sketches: Sequence[Sketch]) -> None:
        self.places = _places_of(tags)
        self._numbers = np.empty((len(sketches), _NUMBERS))
        self._parts: list[bytes] = []
        for start in range(0, len(sketches), SLICE):
            yield_lock()
            part = sketches[start : start + SLICE]
            self._numbers[start : start + SLICE] = [
                (s.total, s.total_squares, s.low, s.high, s.count, s.zero_count, s.nan_count, s.inf_count,
                 s.histogram_share) for s in part
            ]  # fmt: skip
            self._parts.append(_packed([s.codes for s in part], [s.counts for s in part]))

    def __getitem__(self, tag: str) -> Sketch:
        place = self.places[tag]
        codes, counts, ends = _unpacked(self._parts[place // SLICE])
        within = place % SLICE
        start, end = ends[within - 1] if within else 0, ends[within]
        total, squares, low, high, count, zeros, nans, infs, share = self._numbers[place].tolist()
        return Sketch(
            codes[start:end].copy(), counts[start:end].copy(), total, squares, low, high, int(count), int(zeros),
            int(nans), int(infs), share,
        )  # fmt: skip


_NUMBERS = 9
_HEADER = 2


def _packed(codes: list[npt.NDArray[np.uint16]], counts: list[IntArray]) -> bytes:
    """Codes and counts of several sketches, one behind the other.

    A header of two numbers says how many sketches there are and how many bytes a count has; behind it stand the ends
    of the sketches, the differences of the codes, and the counts, the last two byte by byte of like weight.
    """
    ends = np.cumsum([len(each) for each in codes]).astype(np.uint32)
    every = np.concatenate(counts)
    width = next(width for width in (1, 2, 4, 8) if not every.size or every.max() < 1 << (8 * width - (width == 8)))
    every_code = np.concatenate(codes)
    steps = every_code.copy()
    steps[1:] -= every_code[:-1]  # modulo 65,536 where a sketch begins
    body = b"".join(
        (
            np.array([len(codes), width], np.uint32).tobytes(),
            ends.tobytes(),
            _planes(steps, 2),
            _planes(every.astype(f"<u{width}"), width),
        )
    )
    return zlib.compress(body, _LEVEL)


def _planes(values: npt.NDArray[np.unsignedinteger], width: int) -> bytes:
    """The lowest bytes of all values, then the next ones: those alike stand together, which packs better."""
    planes: bytes = values.view(np.uint8).reshape(-1, width).T.tobytes()
    return planes


@functools.lru_cache(maxsize=_CACHED)
def _unpacked(packed: bytes) -> tuple[npt.NDArray[np.uint16], IntArray, list[int]]:
    """Codes and counts of several sketches, and where each ends."""
    body = np.frombuffer(zlib.decompress(packed), np.uint8)
    number, width = body[: 4 * _HEADER].view(np.uint32).tolist()
    start = 4 * (_HEADER + number)
    ends = body[4 * _HEADER : start].view(np.uint32).tolist()
    size = ends[-1]
    steps = body[start : start + 2 * size].reshape(2, size).T.copy().view(np.uint16).ravel()
    counts = body[start + 2 * size :].reshape(width, size).T.copy().view(f"<u{width}").ravel()
    return np.cumsum(steps, dtype=np.uint16), counts.astype(np.int64), ends
