"""The object that `engine.c` was built into: found, checked and loaded; nothing where there was no compiler."""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["SHORT", "Rooms", "functions", "is_there"]

_INTERFACE = 9
"""Raised with every change to a signature in `engine.c`: an object built of an older one would write anywhere."""

SHORT = 32_768
"""Elements up to which a call keeps the interpreter lock, for at most 20 us."""

_Room = TypeVar("_Room")

_pointer, _number, _kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Functions(NamedTuple):
    """What the object offers."""

    accumulate: Any
    sketch: Any
    sketches: Any
    ranges: Any
    flat: Any
    zero_rows: Any
    histograms: Any
    gather: Any
    buckets: Any
    magnitudes: Any
    ranges_of_many: Any
    zero_rows_in: Any
    pack: Any
    unpack: Any
    patterns: Any
    rows: Any


class _Library(NamedTuple):
    """The same functions twice."""

    keeping: _Functions
    """They keep the interpreter lock."""

    releasing: _Functions
    """They give it up meanwhile."""


def _load() -> _Library | None:
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = here / f"_engine{suffix}"
        if path.is_file():
            try:
                keeping, releasing = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
                if releasing.instrument_interface() == _INTERFACE:
                    return _Library(_functions(keeping), _functions(releasing))
            except (OSError, AttributeError):  # built for another machine, or of another interface
                continue
    return None


def _functions(library: ctypes.CDLL) -> _Functions:
    functions = _Functions(
        library.instrument_accumulate,
        library.instrument_sketch,
        library.instrument_sketches,
        library.instrument_ranges,
        library.instrument_flat,
        library.instrument_zero_rows,
        library.instrument_histograms,
        library.instrument_gather,
        library.instrument_buckets,
        library.instrument_magnitudes,
        library.instrument_ranges_of_many,
        library.instrument_zero_rows_in,
        library.instrument_pack,
        library.instrument_unpack,
        library.instrument_patterns,
        library.instrument_rows,
    )
    values, cube = (_pointer, _kind), (_number, _number, _number)
    functions.accumulate.argtypes = (*values, _number, _number, _pointer, _pointer, _pointer)
    functions.accumulate.restype = None
    functions.sketch.argtypes = (*values, _number, _pointer, _pointer, _pointer)
    functions.sketch.restype = ctypes.c_int64
    functions.sketches.argtypes = (*values, _pointer, _number, _pointer, _pointer, _pointer, _pointer)
    functions.sketches.restype = ctypes.c_int64
    functions.ranges.argtypes = (*values, *cube, *cube, _pointer, _pointer)
    functions.ranges.restype = ctypes.c_double
    functions.flat.argtypes = (*values, *cube, _number, ctypes.c_float, ctypes.c_float, _pointer)
    functions.flat.restype = None
    functions.zero_rows.argtypes = (*values, _number, _number, _pointer)
    functions.zero_rows.restype = ctypes.c_int64
    functions.histograms.argtypes = (_number, *[_pointer] * 7)
    functions.histograms.restype = ctypes.c_int64
    functions.gather.argtypes = (_number, _pointer, _pointer, _pointer)
    functions.gather.restype = None
    functions.buckets.argtypes = (_number, *[_pointer] * 10)
    functions.buckets.restype = ctypes.c_int64
    functions.magnitudes.argtypes = (_number, *[_pointer] * 6, _number, _pointer)
    functions.magnitudes.restype = None
    functions.ranges_of_many.argtypes = (*values, _number, *[_pointer] * 6)
    functions.ranges_of_many.restype = None
    functions.zero_rows_in.argtypes = (*values, _number, *[_pointer] * 5)
    functions.zero_rows_in.restype = None
    functions.pack.argtypes = (_number, _number, *[_pointer] * 5)
    functions.pack.restype = None
    functions.unpack.argtypes = (_number, *[_pointer] * 4)
    functions.unpack.restype = None
    functions.patterns.argtypes = (_pointer, _number, _pointer, _pointer, _pointer)
    functions.patterns.restype = ctypes.c_int64
    functions.rows.argtypes = (_pointer, _number, _number, *[_pointer] * 4)
    functions.rows.restype = ctypes.c_int64
    return functions


loaded = _load()
"""The functions; None where the package was installed without a compiler."""


def is_there() -> bool:
    """Whether the package was installed with these functions."""
    return loaded is not None


def functions(size: float = math.inf) -> _Functions:
    """The functions for a call about so many elements, where `is_there`; without a number, for a long call.

    A short call keeps the interpreter lock: given up, another thread has it before this one comes back, and may keep it
    for longer than the call took.
    """
    assert loaded is not None
    return loaded.keeping if size <= SHORT else loaded.releasing


class Rooms(threading.local, Generic[_Room]):
    """The rooms of a thread that nobody uses: a finalizer or a signal that measures in the middle of it has another.

    Args:
        make: Makes a room, where all are in use.
    """

    def __init__(self, make: Callable[[], _Room]) -> None:
        self._make = make
        self._free: list[_Room] = []

    def take(self) -> _Room:
        """One that is nobody else's until it is given back."""
        return self._free.pop() if self._free else self._make()

    def give_back(self, room: _Room) -> None:
        """It is used no more."""
        self._free.append(room)
