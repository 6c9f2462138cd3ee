"""Units: what each output feature of a module did, tallied in one pass and merged exactly."""

from instrument.measure.units.late import LateTallies, LateTally, Ranges, Rows
from instrument.measure.units.on_device import tally_on_device
from instrument.measure.units.reduce import (
    Extent,
    extent_of,
    living_rows,
    rows_together,
    tally_of_range,
    tally_plain,
    tally_rows,
    tally_units,
    zero_rows,
)
from instrument.measure.units.tally import BoolArray, DeviceTally, UnitTally, Witness, merge_tallies

__all__ = [
    "BoolArray",
    "DeviceTally",
    "Extent",
    "LateTallies",
    "LateTally",
    "Ranges",
    "Rows",
    "UnitTally",
    "Witness",
    "extent_of",
    "living_rows",
    "merge_tallies",
    "rows_together",
    "tally_of_range",
    "tally_on_device",
    "tally_plain",
    "tally_rows",
    "tally_units",
    "zero_rows",
]
