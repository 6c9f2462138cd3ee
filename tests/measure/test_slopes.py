"""The table of slopes, held against the derivatives that autograd gives in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from instrument.config import FUNCTIONS
from instrument.measure.slopes import _BY_NAME, DEAD_SLOPE, FLAT_SLOPE, Slopes, Tails, slopes_named, slopes_of

MODULES: list[nn.Module] = [
    nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(),
    nn.Softplus(beta=3.0), nn.ELU(), nn.ELU(0.3), nn.ELU(0.02), nn.ELU(0.0), nn.ELU(2.5), nn.CELU(), nn.CELU(0.4),
    nn.SELU(), nn.Hardtanh(), nn.Hardtanh(-2.5, 0.5), nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid(),
    nn.Threshold(0.3, -1.0), nn.LeakyReLU(0.0),
]  # fmt: skip

CALLED: dict[str, Any] = {
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "swish": functional.silu,
}


def slope(function: Any, z: float) -> float:
    """Magnitude of the derivative in float64."""
    point = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(function(point), point)
    return abs(found.item())


def check_tails(function: Any, tails: Tails, limit: float) -> None:
    """Flat at both ends and beyond; not flat right inside of them, so that a tail reaches exactly so far."""
    assert tails.low > -math.inf or tails.high < math.inf
    for bound, outward in ((tails.low, -1.0), (tails.high, 1.0)):
        if math.isinf(bound):
            assert slope(function, 30.0 * outward) >= limit
            continue
        for distance in (1e-6, 0.1, 1.0, 5.0, 20.0):
            assert slope(function, bound + outward * distance) < limit, (bound, distance)
        assert slope(function, bound - outward * 1e-6) >= limit


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules(module: nn.Module) -> None:
    """A module's tails end exactly where its derivative in float64 crosses 0.05 and 0.01."""
    slopes = slopes_of(module)
    assert slopes is not None
    check_tails(module, slopes.flat, FLAT_SLOPE)
    check_tails(module, slopes.dead, DEAD_SLOPE)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "leaky_relu"])
def test_functions(name: str) -> None:
    """The tails of a function end exactly where its derivative in float64 crosses 0.05 and 0.01."""
    function = CALLED.get(name) or getattr(functional, name)
    check_tails(function, slopes_named(name).flat, FLAT_SLOPE)
    check_tails(function, slopes_named(name).dead, DEAD_SLOPE)


def test_every_function_is_known() -> None:
    """The names that the configuration allows are those of the table."""
    assert tuple(_BY_NAME) == FUNCTIONS


@pytest.mark.parametrize("module", [nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.LeakyReLU(0.2)], ids=repr)
def test_never_flat(module: nn.Module) -> None:
    """What has a slope everywhere is flat nowhere."""
    slopes = slopes_of(module)
    assert slopes is not None
    assert slopes.flat == slopes.dead == Tails(-math.inf, math.inf)


def in_tails(values: torch.Tensor, tails: Tails) -> list[bool]:
    return ((values <= tails.low) | (values >= tails.high)).tolist()


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_outputs_tell_the_same(module: nn.Module) -> None:
    """Where the output is said to tell the tails apart, it does so for the same samples as the input."""
    slopes = slopes_of(module)
    assert slopes is not None
    by_output = slopes.by_output()
    z = torch.linspace(-9.0, 9.0, 36001, dtype=torch.float64)
    if by_output is None:
        assert slopes.function in {"gelu", "gelu_tanh", "silu", "mish", "hardswish"}
        return
    edges = [abs(z - bound) < 1e-9 for bound in (*slopes.flat, *slopes.dead) if math.isfinite(bound) and bound != 0.0]
    away = ~torch.stack(edges).any(0) if edges else torch.ones_like(z, dtype=torch.bool)
    for tails, output_tails in ((slopes.flat, by_output.flat), (slopes.dead, by_output.dead)):
        assert in_tails(z[away], tails) == in_tails(module(z)[away], output_tails)


def test_a_value_above_the_threshold_tells_nothing() -> None:
    """A threshold whose value lies above it cannot be judged by its output."""
    slopes = slopes_of(nn.Threshold(0.0, 5.0))
    assert slopes is not None
    assert slopes.by_output() is None


class _Swish(nn.SiLU):
    """Calls itself a SiLU and is something else."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 2 * z


class _Named(nn.ReLU):
    """A ReLU under another name."""


def test_replaced_forwards_are_no_nonlinearity() -> None:
    """A subclass counts as its base only while it computes what that does; other modules are none."""
    assert slopes_of(_Swish()) is None
    assert slopes_of(nn.Linear(2, 2)) is None
    found = slopes_of(_Named())
    assert isinstance(found, Slopes)
    assert found.function == "relu"
    patched = nn.ReLU()
    patched.forward = lambda z: z  # type: ignore[method-assign, assignment]
    assert slopes_of(patched) is None


def test_odd_parameters_are_left_alone() -> None:
    """Negative rates turn a function round: nothing is said of them."""
    assert slopes_of(nn.Softplus(beta=-1.0)) is None
    assert slopes_of(nn.CELU(-1.0)) is None
