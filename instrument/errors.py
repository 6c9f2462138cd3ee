"""The errors and the one warning category of this library, all in one family.

* `InstrumentError`: base of everything that is raised here on purpose

  * `ConfigError` (also `ValueError`): a configuration file, key or argument that cannot be used
  * `SelectionError` (also `ValueError`): globs that select nothing
  * `UnmeasurableError` (also `TypeError`): a tensor whose values cannot be read, such as a meta tensor
  * `RunError`: a run directory or event file that cannot be read or made
  * `RanksError`: the processes of a distributed training do not act together
  * `LaunchError`: TensorBoard could not be started

* `InstrumentWarning`: everything this library warns about; silence it with
  ``warnings.filterwarnings("ignore", category=instrument.InstrumentWarning)``
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings

__all__ = [
    "ConfigError",
    "InstrumentError",
    "InstrumentWarning",
    "LaunchError",
    "RanksError",
    "RunError",
    "SelectionError",
    "UnmeasurableError",
    "keep_interrupt",
    "warn_quietly",
]


class InstrumentError(Exception):
    """Base of all errors that this library raises on purpose."""


class ConfigError(InstrumentError, ValueError):
    """A configuration file, key or argument that cannot be used; the message names what is allowed."""


class SelectionError(InstrumentError, ValueError):
    """Globs that select nothing; the message names the nearest names of the model."""


class UnmeasurableError(InstrumentError, TypeError):
    """A tensor whose values cannot be read, for example on the meta device."""


class RunError(InstrumentError):
    """A run directory or an event file that cannot be read or made."""


class RanksError(InstrumentError):
    """The processes of a distributed training do not act together; the message names the ranks."""


class LaunchError(InstrumentError):
    """TensorBoard could not be started; the message names the ports that were tried."""


class InstrumentWarning(UserWarning):
    """Something could not be observed or written; training goes on."""


def warn_quietly(message: str, stacklevel: int | None = None) -> None:
    """Warn, but never raise: not even where the user turned warnings into errors.

    Used in hooks and on the writer thread, where an exception would end the user's training or the
    thread. With ``-W error`` the message goes to the logger ``instrument`` instead.

    Args:
        message: What happened and what goes on, in one sentence.
        stacklevel: As in `warnings.warn`, counted from the caller; without it no line of code is shown, since what
            goes on in the background has none that a user knows.
    """
    try:
        if stacklevel is None:
            warnings.warn_explicit(message, InstrumentWarning, "instrument", 1, "instrument")
        else:
            warnings.warn(message, InstrumentWarning, stacklevel=stacklevel + 1)
    except Warning:
        logging.getLogger("instrument").warning(message)


def keep_interrupt() -> None:
    """At the end of what is done at exit: have a process that Ctrl-C has ended still end by SIGINT.

    Python notes an interrupt that nobody caught in a flag that each `exec` or `eval` of a text clears, and dataclasses
    and named tuples are made of texts: without this, a module that is first imported while a watch is closed turns
    the exit by signal, by which a shell's loop knows to stop, into exit code 1 (CPython 3.11, Python/pythonrun.c).
    """
    is_exit = not threading.main_thread().is_alive() and not hasattr(sys, "ps1")
    if is_exit and getattr(sys, "last_type", None) is KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102  # no word of a user is in it
