"""Measuring where a tensor lies, without ever waiting for the device."""

from instrument.measure.device.accumulating import FLOATS, accumulate
from instrument.measure.device.batch import DeviceBatch, Devices, DeviceSketch
from instrument.measure.device.edge import CapturingError, Edge, edge_for, is_capturing
from instrument.measure.device.late import LateNumber, Marked, RowSketch

__all__ = [
    "FLOATS",
    "CapturingError",
    "DeviceBatch",
    "DeviceSketch",
    "Devices",
    "Edge",
    "LateNumber",
    "Marked",
    "RowSketch",
    "accumulate",
    "edge_for",
    "is_capturing",
]
