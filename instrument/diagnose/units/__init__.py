"""Units: dead, constant, rare or always on, by windows of samples, with the bound that the evidence allows."""

from instrument.diagnose.units.status import UnitStatus, Verdict, decode, encode
from instrument.diagnose.units.window import CONSTANT_RANGE, RARE_RATE
from instrument.diagnose.units.windows import UnitWindows

__all__ = ["CONSTANT_RANGE", "RARE_RATE", "UnitStatus", "UnitWindows", "Verdict", "decode", "encode"]
