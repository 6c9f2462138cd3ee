"""See inside a PyTorch network while it trains: one line, ``instrument.watch(model)``.

Activations, parameters and gradients, chosen by globs over their names, are measured where they lie and shown
in TensorBoard. Training with and without the watch is bit-identical.
"""

from instrument.config import Config, get_histogram_interval, load_config
from instrument.errors import (
    ConfigError,
    InstrumentError,
    InstrumentWarning,
    LaunchError,
    RunError,
    SelectionError,
    UnmeasurableError,
)
from instrument.measure.custom_op import measure
from instrument.measure.sketch import Sketch

__all__ = [
    "Config",
    "ConfigError",
    "InstrumentError",
    "InstrumentWarning",
    "LaunchError",
    "RunError",
    "SelectionError",
    "Sketch",
    "UnmeasurableError",
    "get_histogram_interval",
    "load_config",
    "measure",
]
