"""`WatchCallback` for Lightning, under the package name ``lightning`` or ``pytorch_lightning``.

``Trainer(callbacks=[WatchCallback(interval=100)])``

Steps are the batches after which an optimizer stepped: the axis on which ``self.log`` draws. It is the trainer's
``global_step``, except that Lightning counts that once for each of several optimizers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from instrument.integrations.trainers import TrainerWatch
from instrument.watcher.watcher import Watcher

__all__ = ["WatchCallback"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type, ...]:
    """`Callback` of each of the two packages that is in use, so that neither trainer takes ours for a stranger.

    Only what is imported already counts where anything is: the packages take seconds to import.
    """
    imported = [name for name in PACKAGES if name in sys.modules]
    found: list[type] = []
    for name in imported or PACKAGES:
        try:
            found.append(importlib.import_module(name).Callback)
        except ImportError:
            continue
        if not imported:
            break
    if not found:
        raise ImportError(
            "instrument.integrations.lightning needs the package lightning or pytorch_lightning: "
            'pip install "torch-instrument[integrations]", or either package alone'
        )
    return tuple(found)


if TYPE_CHECKING:
    Callback = object
    _Callbacks: tuple[type, ...] = ()
else:
    _Callbacks = _callback_classes()

    class Callback(*_Callbacks):
        """Callback of the packages in use."""


class WatchCallback(Callback):
    """Watches the `LightningModule` while it is fitted.

    Args:
        keywords: Those of `instrument.watch`. Without `writer` and `logdir` the trainer's own `TensorBoardLogger` is
            written to; where it has none, a run of our own.

    Raises:
        ConfigError: An unknown keyword, or a value that cannot be used.
        SelectionError: A pattern that cannot be read; where one matches nothing, when the training starts.

    Example:
        >>> WatchCallback(include="net.*", interval=50).watcher is None
        True
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self._watch = TrainerWatch(keywords)
        self._seen_steps = 0

    @property
    def watcher(self) -> Watcher | None:
        """The watch of the fit that goes on or went last; None before the first."""
        return self._watch.watcher

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch, when checkpoints are loaded and the sanity check is over."""
        self._seen_steps = trainer.global_step
        self._watch.begin(pl_module, _logged_step(trainer), lambda: _tensorboard_writer(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lightning calls `training_step`, which may call the module itself or only its parts."""
        self._watch.expect_calls_of_parts()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is over where an optimizer has stepped."""
        if trainer.global_step > self._seen_steps:
            self._seen_steps = trainer.global_step
            self._watch.end_step(_logged_step(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the last step and close, before the trainer's logger is."""
        self._watch.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training ended with an exception; what was seen until then is written."""
        self._watch.end()


def _logged_step(trainer: Any) -> int:
    """Where `self.log` draws what is logged now; `global_step` where this Lightning does not tell."""
    number = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return number if isinstance(number, int) else trainer.global_step


def _tensorboard_writer(trainer: Any) -> Any:
    """The writer of the trainer's first `TensorBoardLogger`; others are not asked, some would connect to a server."""
    for logger in trainer.loggers:
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
            return logger.experiment
    return None
