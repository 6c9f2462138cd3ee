"""Ctrl-C wherever it may come, without a signal."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["interrupted_at"]


class _Interruption(BaseException):
    """As Ctrl-C, in a test."""


def interrupted_at(place: int, functions: Sequence[Callable[..., Any]], call: Callable[[], Any]) -> Any:
    """What a call gives, which is interrupted before an instruction of some functions; None where it was.

    Args:
        place: Before which of the instructions that are executed, counted from 0.
        functions: The functions.
        call: What is called.

    Raises:
        StopIteration: There are fewer instructions.
    """
    codes = {function.__code__ for function in functions}
    left = [place]

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == -1:
                raise _Interruption
        return trace

    sys.settrace(trace)
    try:
        found = call()
    except _Interruption:
        found = None
    finally:
        sys.settrace(None)
    if left[0] >= 0:
        raise StopIteration
    return found
