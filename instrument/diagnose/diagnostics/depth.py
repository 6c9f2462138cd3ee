"""Scale through depth: do activations or gradients shrink or grow from layer to layer?

Only layers of one role are compared, such as ``blocks.*.fc1.weight``, and only where the size rises or falls steadily
with depth: that is how vanishing and exploding look, while a single odd layer is something else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.diagnostics.words import newest, role
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import Reading

__all__ = ["activation_scale", "gradient_scale"]

_FEWEST_LAYERS = 3
_STEADY = 0.9
"""Rank correlation with depth from which on a rise or fall is steady (Spearman's; our proposal)."""


def activation_scale(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN: activations shrink or grow from layer to layer, as after an initialisation of the wrong scale."""
    for names, sizes in _profiles(readings, "activations", config):
        ratio = max(sizes) / min(sizes)
        if ratio <= config.activation_depth_ratio:
            continue
        trend = _trend(sizes)
        if abs(trend) >= _STEADY:
            way = "grows" if trend > 0 else "shrinks"
            yield Finding(
                Level.WARN, "activation_scale", Site("activations", names[-1]), readings[-1].step, ratio,
                config.activation_depth_ratio, "times",
                f"the output {way} from layer to layer, from {sizes[0]:.2g} at {names[0]} to {sizes[-1]:.2g} here: the "
                "weights were initialised at the wrong scale. Use torch.nn.init.kaiming_normal_ (for ReLU) or "
                "xavier_normal_ (for tanh), a normalisation between the layers, or residual connections.",
            )  # fmt: skip


def gradient_scale(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN or CRIT: gradients vanish or explode on their way back through the layers.

    Gradients of matrices are compared, since those of biases before a normalisation are zero but for rounding; where
    none are watched, gradients of activations are.
    """
    last = readings[-1]
    kind = "gradients" if last.has("gradients", "rms") else "activation_gradients"
    for names, sizes in _profiles(readings, kind, config):
        ratio = max(sizes) / min(sizes)
        if ratio <= config.gradient_depth_ratio:
            continue
        trend = _trend(sizes)
        if abs(trend) < _STEADY:
            continue
        if trend > 0:
            is_critical = min(sizes) < config.vanishing_gradient_rms
            yield Finding(
                Level.CRIT if is_critical else Level.WARN, "vanishing_gradient", Site(kind, names[0]), last.step,
                ratio, config.gradient_depth_ratio, "times",
                f"the gradient vanishes on its way back: {sizes[-1]:.2g} at {names[-1]}, but {sizes[0]:.2g} here, so "
                "that the early layers hardly learn. Use ReLU or GELU in place of sigmoid or tanh, residual "
                "connections, a normalisation between the layers, or a larger initialisation.",
            )  # fmt: skip
        else:
            yield Finding(
                Level.WARN, "exploding_gradient", Site(kind, names[0]), last.step, ratio,
                config.gradient_depth_ratio, "times",
                f"the gradient explodes on its way back: {sizes[-1]:.2g} at {names[-1]}, but {sizes[0]:.2g} here. Use "
                "a smaller initialisation, a normalisation between the layers, or clip gradients.",
            )  # fmt: skip


def _profiles(readings: Sequence[Reading], kind: str, config: Config) -> Iterator[tuple[Sequence[str], list[float]]]:
    """Names and mean sizes of the layers of each role, in the order of depth."""
    recent = newest(readings, config.depth_checks, lambda reading: reading.has(kind, "rms"))
    if not recent:
        return
    for names in _of_one_role(tuple(recent[-1].column(kind, "rms")), readings[-1].vectors):
        sizes = np.array([reading.sizes(kind, "rms", names) for reading in recent])
        # A layer whose gradient is zero stops everything behind it; that is no trend, and is told elsewhere.
        if ((sizes > 0.0) & (sizes < math.inf)).all():
            yield names, (10.0 ** np.log10(sizes).mean(axis=0)).tolist()


@functools.lru_cache(maxsize=16)
def _of_one_role(layers: tuple[str, ...], left_out: frozenset[str]) -> list[tuple[str, ...]]:
    """Names of the layers of each role, where there are enough of them; the same come again each step."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        if name not in left_out:
            groups.setdefault(role(name), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) >= _FEWEST_LAYERS]


def _trend(sizes: list[float]) -> float:
    """Spearman's rank correlation of sizes with their place."""
    ranks = np.argsort(np.argsort(sizes))
    return float(np.corrcoef(ranks, np.arange(len(sizes)))[0, 1])
