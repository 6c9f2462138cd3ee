"""See inside a PyTorch network while it trains: one line, ``instrument.watch(model)``.

Activations, parameters and gradients, chosen by globs over their names, are measured where they lie and shown
in TensorBoard. Training with and without the watch is bit-identical.
"""

from instrument.by_hand import TensorBoardLogger
from instrument.config import Config, get_histogram_interval, load_config
from instrument.errors import (
    ConfigError,
    InstrumentError,
    InstrumentWarning,
    LaunchError,
    RanksError,
    RunError,
    SelectionError,
    UnmeasurableError,
)
from instrument.launch import TensorBoardServer, launch_tensorboard
from instrument.measure.custom_op import measure
from instrument.measure.sketch import Sketch
from instrument.record.buffer import StepRecord
from instrument.record.writer import SummaryWriter
from instrument.watcher import Watcher, unwatch, watch

__all__ = [
    "Config",
    "ConfigError",
    "InstrumentError",
    "InstrumentWarning",
    "LaunchError",
    "RanksError",
    "RunError",
    "SelectionError",
    "Sketch",
    "StepRecord",
    "SummaryWriter",
    "TensorBoardLogger",
    "TensorBoardServer",
    "UnmeasurableError",
    "Watcher",
    "get_histogram_interval",
    "launch_tensorboard",
    "load_config",
    "measure",
    "unwatch",
    "watch",
]
