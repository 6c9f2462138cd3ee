"""Configuration: one frozen object, checked when it is made."""

from instrument.config.checks import (
    COMPILED_MODES,
    FUNCTIONS,
    KINDS,
    RANKS_MODES,
    SECTIONS,
    as_interval,
    as_kinds,
    as_patterns,
)
from instrument.config.settings import (
    CONFIG_ENVIRONMENT_VARIABLE,
    Config,
    ConfigSource,
    get_histogram_interval,
    load_config,
)
from instrument.config.thresholds import Thresholds

__all__ = [
    "COMPILED_MODES",
    "CONFIG_ENVIRONMENT_VARIABLE",
    "FUNCTIONS",
    "KINDS",
    "RANKS_MODES",
    "SECTIONS",
    "Config",
    "ConfigSource",
    "Thresholds",
    "as_interval",
    "as_kinds",
    "as_patterns",
    "get_histogram_interval",
    "load_config",
]
