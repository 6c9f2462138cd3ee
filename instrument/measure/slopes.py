"""Slopes: where each nonlinearity is flat, so that its input alone tells whether a unit passes a gradient on.

A sample is *flat* for a unit where the magnitude of the slope at its input z is below a limit. Where that is so is a
tail or two: everything up to one value of z, everything from another value on. Points inside at which a slope crosses
zero (GELU at -0.75, SiLU at -1.28) are no tails and count for nothing.

| nonlinearity | flat at 0.05 | flat at 0.01 |
| --- | --- | --- |
| ReLU, Threshold | z <= 0 (the threshold) | the same |
| ReLU6, Hardtanh, Hardsigmoid | z <= 0, z >= 6 (the module's bounds; -3 and 3) | the same |
| LeakyReLU, PReLU, RReLU | never: what slopes by a hundredth is not dead | never |
| GELU, by tanh, quick | z <= -2.35, -2.36, -2.40 | -3.07, -3.05, -3.68 |
| SiLU, Mish | z <= -4.08, -4.11 | -6.26, -6.26 |
| Tanh | z beyond -2.18 and 2.18 | -2.99 and 2.99 |
| Sigmoid | z beyond -2.89 and 2.89 | -4.58 and 4.58 |
| Softplus, ELU, CELU, SELU | z <= -2.94, -3.00, -3.00, -3.56 | -4.60, -4.61, -4.61, -5.17 |
| Hardswish | z <= -3 | the same |
| LogSigmoid | z >= 2.94 | 4.60 |

The figures are for the modules' default parameters; others are worked out. Every one is held against the derivative
that autograd gives in float64 by a test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

__all__ = ["DEAD_SLOPE", "FLAT_SLOPE", "NO_TAILS", "Slopes", "Tails", "slopes_named", "slopes_of"]

FLAT_SLOPE = 0.05
"""Slope below which a sample is flat, for the share of saturated samples. Karpathy's |tanh| > 0.975."""

DEAD_SLOPE = 0.01
"""Slope below which every sample of a dead unit lies: a gradient that passes is a hundredth of what came."""


class Tails(NamedTuple):
    """Where a function is flat: at values up to `low`, and from `high` on; infinite where there is no such tail."""

    low: float
    high: float


NO_TAILS = Tails(-math.inf, math.inf)
"""Of a function that is flat nowhere."""


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Where one nonlinearity, with its parameters, is flat.

    Example:
        >>> slopes_named("relu").dead
        Tails(low=0.0, high=inf)
    """

    function: str
    """Name of the nonlinearity, one of `instrument.config.FUNCTIONS` or "threshold"."""

    flat: Tails
    """Where the slope is below `FLAT_SLOPE`."""

    dead: Tails
    """Where the slope is below `DEAD_SLOPE`."""

    is_piecewise_linear: bool = False
    """Whether a unit that is never flat is used as a linear one."""

    outputs: tuple[Tails, Tails] | None = None
    """`flat` and `dead` in terms of what the function returns; None where that does not tell them apart, because the
    function falls and rises again."""

    def by_output(self) -> Slopes | None:
        """The same, to be held against what the function returned; None where that does not tell."""
        if self.outputs is None:
            return None
        return dataclasses.replace(self, flat=self.outputs[0], dead=self.outputs[1])


def slopes_of(module: nn.Module) -> Slopes | None:
    """Where the nonlinearity that a module is, is flat.

    Args:
        module: Any module; its parameters (`alpha`, `beta`, `min_val` ...) are read, never its tensors.

    Returns:
        The tails; None for a module that is no nonlinearity of the table, or whose forward was replaced.

    Example:
        >>> slopes_of(nn.Hardtanh(-2.0, 2.0)).flat
        Tails(low=-2.0, high=2.0)
    """
    for base in type(module).__mro__:
        make = _BY_CLASS.get(base)
        if make is not None:
            is_replaced = getattr(type(module), "forward", None) is not getattr(base, "forward", None)
            return (
                None
                if is_replaced or getattr(module.forward, "__func__", None) is not type(module).forward
                else make(module)
            )
    return None


def slopes_named(function: str) -> Slopes:
    """Where a nonlinearity is flat that is called as a function, with its default parameters.

    Args:
        function: One of `instrument.config.FUNCTIONS`.

    Returns:
        The tails.

    Raises:
        KeyError: There is no such function; `Config` has checked that before.
    """
    return _BY_NAME[function]()


def _monotone(
    function: str,
    tails: Callable[[float], Tails],
    values: Callable[[float], Tails],
    is_piecewise_linear: bool = False,
) -> Slopes:
    """A function that never falls, whose output tells as much as its input: tails and their values by slope."""
    outputs = values(FLAT_SLOPE), values(DEAD_SLOPE)
    return Slopes(function, tails(FLAT_SLOPE), tails(DEAD_SLOPE), is_piecewise_linear, outputs)


def _bounded(function: str, low: float, high: float, values: Tails | None = None) -> Slopes:
    """Linear between two bounds and constant beyond them."""
    bounds = Tails(low, high)
    return _monotone(function, lambda _: bounds, lambda _: values or bounds, is_piecewise_linear=True)


def _relu() -> Slopes:
    return _bounded("relu", 0.0, math.inf)


def _leaky(function: str, negative_slope: float = 0.01) -> Slopes:
    """Never flat, unless its slope is nothing at all."""
    if negative_slope == 0:
        return dataclasses.replace(_relu(), function=function)
    return Slopes(function, NO_TAILS, NO_TAILS, outputs=(NO_TAILS, NO_TAILS))


def _threshold(threshold: float, value: float) -> Slopes:
    """What is not above the threshold becomes a value; where that is above it too, the output does not tell."""
    tails = Tails(threshold, math.inf)
    outputs = (Tails(value, math.inf),) * 2 if value <= threshold else None
    return Slopes("threshold", tails, tails, is_piecewise_linear=True, outputs=outputs)


def _tanh() -> Slopes:
    """Slope 1 - tanh(z)**2."""

    def values(slope: float) -> Tails:
        bound = math.sqrt(1 - slope)
        return Tails(-bound, bound)

    def tails(slope: float) -> Tails:
        bound = math.atanh(math.sqrt(1 - slope))
        return Tails(-bound, bound)

    return _monotone("tanh", tails, values)


def _sigmoid() -> Slopes:
    """Slope s(z) * (1 - s(z)), at most 1/4."""

    def values(slope: float) -> Tails:
        bound = (1 - math.sqrt(1 - 4 * slope)) / 2
        return Tails(bound, 1 - bound)

    return _monotone("sigmoid", lambda slope: Tails(*(math.log(s / (1 - s)) for s in values(slope))), values)


def _softplus(beta: float = 1.0) -> Slopes:
    """Slope sigmoid(beta * z)."""
    return _monotone(
        "softplus",
        lambda slope: Tails(math.log(slope / (1 - slope)) / beta, math.inf),
        lambda slope: Tails(-math.log1p(-slope) / beta, math.inf),
    )


def _log_sigmoid() -> Slopes:
    """Slope sigmoid(-z)."""
    return _monotone(
        "logsigmoid",
        lambda slope: Tails(-math.inf, math.log((1 - slope) / slope)),
        lambda slope: Tails(-math.inf, math.log1p(-slope)),
    )


def _exponential(function: str, factor: float, rate: float = 1.0) -> Slopes:
    """``factor * (exp(z / rate) - 1)`` below zero, with a slope of ``factor / rate * exp(z / rate)``."""

    def tails(slope: float) -> Tails:
        steepest = factor / rate
        return Tails(min(0.0, rate * math.log(slope / steepest)) if steepest > 0 else 0.0, math.inf)

    def values(slope: float) -> Tails:
        return Tails(factor * math.expm1(tails(slope).low / rate), math.inf)

    return _monotone(function, tails, values)


def _elu(alpha: float = 1.0) -> Slopes:
    """An `alpha` below zero makes it fall and rise, so that its output does not tell."""
    found = _exponential("elu", abs(alpha))
    return found if alpha >= 0 else dataclasses.replace(found, outputs=None)


def _selu() -> Slopes:
    return _exponential("selu", 1.0507009873554805 * 1.6732632423543772)  # Klambauer et al. 2017, scale and alpha


def _lower(function: str, flat: float, dead: float) -> Callable[[], Slopes]:
    """A function with one lower tail that falls and rises again; its tails are roots without a closed form."""
    return lambda: Slopes(function, Tails(flat, math.inf), Tails(dead, math.inf))


_gelu = _lower("gelu", -2.348606332, -3.067427204)
_gelu_tanh = _lower("gelu_tanh", -2.355164355, -3.052854995)
_silu = _lower("silu", -4.082559352, -6.261388849)
_mish = _lower("mish", -4.111718193, -6.263968786)
_hardswish = _lower("hardswish", -3.0, -3.0)


def _quick_gelu() -> Slopes:
    """``z * sigmoid(1.702 * z)``, whose slope at z is that of SiLU at 1.702 z."""
    silu = _silu()
    return Slopes("quick_gelu", Tails(silu.flat.low / 1.702, math.inf), Tails(silu.dead.low / 1.702, math.inf))


_BY_NAME: dict[str, Callable[[], Slopes]] = {  # the names of instrument.config.FUNCTIONS, in their order
    "relu": _relu,
    "relu6": lambda: _bounded("relu6", 0.0, 6.0),
    "leaky_relu": lambda: _leaky("leaky_relu"),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
    "swish": _silu,
    "mish": _mish,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "elu": _elu,
    "celu": lambda: _exponential("celu", 1.0),
    "selu": _selu,
    "hardtanh": lambda: _bounded("hardtanh", -1.0, 1.0),
    "hardswish": _hardswish,
    "hardsigmoid": lambda: _bounded("hardsigmoid", -3.0, 3.0, Tails(0.0, 1.0)),
    "logsigmoid": _log_sigmoid,
}

_Maker: TypeAlias = Callable[[Any], "Slopes | None"]

_BY_CLASS: dict[type, _Maker] = {
    nn.ReLU: lambda _: _relu(),
    nn.ReLU6: lambda _: _bounded("relu6", 0.0, 6.0),
    nn.LeakyReLU: lambda module: _leaky("leaky_relu", module.negative_slope),
    nn.PReLU: lambda _: _leaky("prelu"),
    nn.RReLU: lambda _: _leaky("rrelu"),
    nn.GELU: lambda module: _gelu_tanh() if module.approximate == "tanh" else _gelu(),
    nn.SiLU: lambda _: _silu(),
    nn.Mish: lambda _: _mish(),
    nn.Tanh: lambda _: _tanh(),
    nn.Sigmoid: lambda _: _sigmoid(),
    nn.Softplus: lambda module: _softplus(module.beta) if module.beta > 0 else None,
    nn.ELU: lambda module: _elu(module.alpha),
    nn.CELU: lambda module: _exponential("celu", module.alpha, module.alpha) if module.alpha > 0 else None,
    nn.SELU: lambda _: _selu(),
    nn.Hardtanh: lambda module: _bounded("hardtanh", module.min_val, module.max_val),
    nn.Hardswish: lambda _: _hardswish(),
    nn.Hardsigmoid: lambda _: _bounded("hardsigmoid", -3.0, 3.0, Tails(0.0, 1.0)),
    nn.LogSigmoid: lambda _: _log_sigmoid(),
    nn.Threshold: lambda module: _threshold(module.threshold, module.value),
}
