"""The watch behind a trainer's callback.

Keywords are checked when the callback is made, and what can only be refused with a model at hand when training begins.
From then on nothing that goes wrong here reaches the trainer, unless `strict` was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from instrument.errors import InstrumentError, warn_quietly
from instrument.watcher.keywords import check_keywords
from instrument.watcher.watch import watch
from instrument.watcher.watcher import Watcher

__all__ = ["TrainerWatch"]


class TrainerWatch:
    """Watches the model of one training at a time, with the trainer's numbers of steps.

    Args:
        keywords: Keywords of `instrument.watch`.

    Raises:
        ConfigError: An unknown keyword, or a value that cannot be used.
        SelectionError: A pattern that cannot be read.

    Example:
        >>> TrainerWatch({"interval": 0}).watcher is None
        True
    """

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        self._keywords, _ = check_keywords(keywords)
        self.watcher: Watcher | None = None
        """The watch of the training that goes on or went last; None before the first."""
        self.is_open = False
        """Whether a training goes on."""
        self._shift = 0

    def begin(self, model: nn.Module, step: int, find_writer: Callable[[], Any]) -> None:
        """Begin to watch; does nothing while a watch is open.

        Args:
            model: What is trained.
            step: The trainer's number of the step that comes next.
            find_writer: Gives the writer of the trainer's own TensorBoard logger, or None.

        Raises:
            InstrumentError: A selection or a writer that cannot be meant; training has not begun yet.
        """
        if self.is_open:
            return
        keywords = {"initial_step": step, **self._keywords}
        self._shift = keywords["initial_step"] - step
        self.is_open = True
        try:
            if keywords.get("writer") is None and keywords.get("logdir") is None:
                keywords["writer"] = find_writer()
            self.watcher = watch(model, **keywords)
        except InstrumentError:
            self.is_open = False
            raise
        except Exception as error:
            self._failed(error)

    def expect_calls_of_parts(self) -> None:
        """The step that begins may call the model's modules without calling the model."""
        self._guard(lambda watcher: watcher._expect_calls_of_parts())

    def end_step(self, step: int) -> None:
        """The trainer has made the step of this number."""
        self._guard(lambda watcher: watcher.step(step + self._shift))

    def end(self) -> None:
        """Log the last step and close; the writer stays the trainer's."""
        self._guard(lambda watcher: watcher.close())
        self.is_open = False

    def _guard(self, action: Callable[[Watcher], object]) -> None:
        if self.is_open and self.watcher is not None:
            try:
                action(self.watcher)
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        if self._keywords.get("strict"):
            raise error
        warn_quietly(f"this library failed with {type(error).__name__}: {error}; training goes on", stacklevel=4)
