"""Measuring where a tensor lies, without ever waiting for the device."""

from instrument.measure.device.accumulating import FLOATS, accumulate
from instrument.measure.device.batch import DeviceBatch, DeviceSketch
from instrument.measure.device.columns import FIELDS, DeviceColumns
from instrument.measure.device.devices import Devices, is_plain
from instrument.measure.device.edge import CapturingError, Edge, edge_for, is_capturing
from instrument.measure.device.late import LateNumber, Marked, RowSketch

__all__ = [
    "FIELDS",
    "FLOATS",
    "CapturingError",
    "DeviceBatch",
    "DeviceColumns",
    "DeviceSketch",
    "Devices",
    "Edge",
    "LateNumber",
    "Marked",
    "RowSketch",
    "accumulate",
    "edge_for",
    "is_capturing",
    "is_plain",
]
