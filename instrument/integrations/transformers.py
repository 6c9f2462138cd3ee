"""`WatchCallback` for the `Trainer` of Hugging Face transformers.

``Trainer(..., callbacks=[WatchCallback(interval=100)])``

Steps have the number that ``state.global_step`` shows while they are made, so that the first is 0. The trainer draws
the loss of the same step at that number plus one, since it has counted the step by then.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from instrument.integrations.trainers import TrainerWatch
from instrument.watcher.watcher import Watcher

__all__ = ["WatchCallback"]

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "instrument.integrations.transformers needs the packages transformers and accelerate: "
            'pip install "torch-instrument[integrations]", or these packages alone'
        ) from error


class WatchCallback(TrainerCallback):
    """Watches the model of a `Trainer` while it trains.

    Args:
        keywords: Those of `instrument.watch`. Without `writer` and `logdir` the writer of the trainer's own
            `TensorBoardCallback` (``report_to="tensorboard"``) is written to; where it has none, a run of our own.

    Raises:
        ConfigError: An unknown keyword, or a value that cannot be used.
        SelectionError: A pattern that cannot be read; where one matches nothing, when the training starts.

    Example:
        >>> WatchCallback(include="**.attn", interval=50).watcher is None
        True
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self._watch = TrainerWatch(keywords)
        self._lent_writer: Any = None

    @property
    def watcher(self) -> Watcher | None:
        """The watch of the training that goes on or went last; None before the first."""
        return self._watch.watcher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An earlier training may have ended with an exception, of which the trainer tells nobody."""
        self._watch.end()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch before the first step, when every other callback is ready."""
        self._watch.begin(kwargs["model"], state.global_step, self._borrow_writer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over, and the trainer has counted it."""
        self._watch.end_step(state.global_step - 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close after the last step: the trainer's own callback closes its writer before it is our turn again."""
        if control.should_training_stop:
            self._watch.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close where the end was decided on after the epoch; a writer that was closed is opened once more for it."""
        has_more_to_write = self._watch.is_open
        self._watch.end()
        if has_more_to_write and self._lent_writer is not None and self._tensorboard_writer() is None:
            self._lent_writer.close()

    def _borrow_writer(self) -> Any:
        self._lent_writer = self._tensorboard_writer()
        return self._lent_writer

    def _tensorboard_writer(self) -> Any:
        """The writer of the `TensorBoardCallback` in the same list as this callback.

        A trainer tells its callbacks neither of itself nor of each other.
        """
        from transformers.integrations import TensorBoardCallback

        for referrer in gc.get_referrers(self):
            if type(referrer) is list:
                for callback in referrer:
                    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                        return callback.tb_writer
        return None
