"""Logging by hand: the functions of the original TensorBoard document, for loops that do not use `watch`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from instrument.capture.names import Site, named_modules, named_parameters
from instrument.config import ConfigSource, load_config
from instrument.errors import ConfigError, RunError, UnmeasurableError, warn_quietly
from instrument.measure.batch import measure_many
from instrument.record.buffer import StepRecord
from instrument.record.runs import make_run_directory
from instrument.record.tags import tag_of
from instrument.record.writer import REQUIRED_METHODS, RecordSink, SummaryWriter, sink_for

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger:
    """Writes histograms of a model's parameters and gradients, and of activations, when it is told to.

    Args:
        logdir_or_writer: A directory, or anything with the methods of a `SummaryWriter`, the user's to close.
            Without it, a new run directory.
        config: As in `instrument.load_config`. Where `histogram_interval` is 0 or negative, the logger does
            nothing and makes no file.

    Raises:
        ConfigError: A configuration or a writer that cannot be used.

    Example:
        >>> import tempfile, torch
        >>> from instrument import TensorBoardLogger
        >>> logger = TensorBoardLogger(tempfile.mkdtemp())
        >>> logger.log_model_histograms(torch.nn.Linear(2, 1), step=0)
        >>> logger.log_activation_histograms({"layer1_output": torch.ones(3)}, step=0)
        >>> logger.close()
    """

    def __init__(self, logdir_or_writer: Any = None, config: ConfigSource | None = None) -> None:
        settings = load_config(config)
        self._sink: RecordSink | None = None
        self.writer: Any = None
        """What is written to; None where logging is switched off."""
        if settings.histogram_interval <= 0:
            return
        if logdir_or_writer is None or isinstance(logdir_or_writer, (str, os.PathLike)):
            try:
                directory = logdir_or_writer or make_run_directory(settings.runs_directory)
                self.writer = SummaryWriter(os.fspath(directory))
                self._sink = sink_for(self.writer, is_users=False)
            except (OSError, RunError) as error:
                warn_quietly(f"{error}; nothing is logged, training goes on", stacklevel=2)
                return
        elif any(hasattr(logdir_or_writer, name) for name in REQUIRED_METHODS):
            self.writer = logdir_or_writer
            self._sink = sink_for(self.writer)
        else:
            raise ConfigError(
                f"logdir_or_writer is {logdir_or_writer!r}, allowed is a directory or anything with the methods of "
                "torch.utils.tensorboard.SummaryWriter"
            )

    def log_model_histograms(self, model: nn.Module, step: int) -> None:
        """Write ``Parameters/{name}``, and ``Gradients/{name}`` where there is a gradient.

        Args:
            model: Its parameters are read as they are now, after the step if called there.
            step: Number of the step.

        Raises:
            ConfigError: `model` is no module, or `step` no whole number.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {model!r}, allowed is a torch.nn.Module")
        seen: set[int] = set()
        tensors: list[tuple[Site, torch.Tensor]] = []
        for place, parameter in named_parameters(named_modules(model)):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                tensors.append((Site("parameters", place.name), parameter))
                if parameter.grad is not None:
                    tensors.append((Site("gradients", place.name), parameter.grad))
        self._log(tensors, step)

    def log_activation_histograms(self, activations: Mapping[str, torch.Tensor], step: int) -> None:
        """Write ``Activations/{name}``.

        Args:
            activations: Name to tensor, of any shape and type.
            step: Number of the step.

        Raises:
            ConfigError: `activations` is no mapping of tensors, or `step` no whole number.
        """
        if not isinstance(activations, Mapping):
            raise ConfigError(f"activations is {type(activations).__name__}, allowed is a mapping from name to tensor")
        for name, tensor in activations.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"activations[{name!r}] is {type(tensor).__name__}, allowed is a torch.Tensor")
        self._log([(Site("activations", str(name)), tensor) for name, tensor in activations.items()], step)

    def close(self) -> None:
        """Write what waits; close the writer unless it is the user's. Does nothing the second time."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()

    def _log(self, tensors: Iterable[tuple[Site, torch.Tensor]], step: int) -> None:
        if isinstance(step, bool) or not hasattr(step, "__index__"):
            raise ConfigError(f"step is {step!r}, allowed is a whole number")
        if self._sink is None:
            return
        sketches = {}
        pairs = list(tensors)
        for (site, _), found in zip(pairs, measure_many(tensor for _, tensor in pairs), strict=True):
            if isinstance(found, UnmeasurableError):
                warn_quietly(f"{site.kind} of {site.name} are not measured: {found}", stacklevel=3)
            elif isinstance(found, Exception):
                raise found
            else:
                sketches[tag_of(site)] = found
        if sketches:
            self._sink.write(StepRecord(int(step), sketches, time.time()), scalars=False, histograms=True)

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
