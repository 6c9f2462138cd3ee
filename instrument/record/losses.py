"""Losses: the numbers of a run that the user logs, and from which a spike is seen first."""

from __future__ import annotations

import re
from collections import deque

__all__ = ["Losses"]

_IS_LOSS = re.compile(r"(?:^|[^a-z])loss(?:$|[^a-z])", re.IGNORECASE)
_IS_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:val|valid|validation|eval|evaluation|test|dev)(?:$|[^a-z])", re.IGNORECASE)
_KEPT = 1024


class Losses:
    """The training loss, as it is logged: of the first tag that is called so.

    A tag counts where "loss" is a word of it ("loss", "train/loss", "train_loss", "Loss/train") and nothing in it
    tells of held-out data ("val_loss", "eval/loss").

    Example:
        >>> losses = Losses()
        >>> losses.add("val_loss", 0, 9.0), losses.add("train/loss", 0, 2.0), losses.add("train/loss", 5, 1.0)
        (None, None, None)
        >>> losses.at(4), losses.at(5)
        (2.0, 1.0)
    """

    def __init__(self) -> None:
        self._tag: str | None = None
        self._values: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def add(self, tag: str, step: int, value: float) -> None:
        """Take a scalar that was logged, if it is the loss.

        Args:
            tag: Its tag.
            step: Its step.
            value: The scalar; NaN and Inf are taken as they are.
        """
        if self.wants(tag):
            self._tag = tag
            self._values.append((step, value))

    def wants(self, tag: str) -> bool:
        """Whether a scalar of this tag would be taken."""
        if self._tag is not None:
            return tag == self._tag
        return bool(_IS_LOSS.search(tag)) and not _IS_HELD_OUT.search(tag)

    def at(self, step: int, since: int | None = None) -> float | None:
        """The loss of a step, or the last before it.

        Args:
            step: The step.
            since: Where given, an older loss than of the step after this one counts as none.

        Returns:
            The loss, NaN and Inf included; None where none was logged.
        """
        for logged, value in reversed(tuple(self._values)):
            if logged <= step:
                return value if since is None or logged > since else None
        return None
