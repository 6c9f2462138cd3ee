"""Thresholds of the diagnostics: one key each, with where it comes from.

Where a threshold is our own proposal, or where a published one was found to accuse healthy trainings, its text says
so. ``[-1.7]`` and the like are log10.
"""

from __future__ import annotations

import dataclasses

from instrument.config.checks import as_real, as_whole, setting

__all__ = ["Thresholds"]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The part of `Config` that says when something is worth telling.

    Example:
        >>> Thresholds().dead_fraction_warn
        0.1
    """

    finding_cooldown: int = setting(1000, lambda value: as_whole(value, 0))
    """Steps for which a finding must have been absent before it is told again; one that stays is told once."""

    non_finite_burst: int = setting(20, lambda value: as_whole(value, 0))
    """Steps after the first NaN or Inf of a watch that are all sampled; 0 for none."""

    spike_sigma: float = setting(6.0, lambda value: as_real(value, 1.0))
    """Standard deviations above the mean of the window from which on a loss or a gradient norm is a spike. 6 over a
    window of 128 is OLMo-core's rule; ours takes it of log10, since norms of mini-batch gradients are spread like a
    log-normal, and by the plain rule every small network that has learnt its task spikes now and then."""

    spike_window: int = setting(128, lambda value: as_whole(value, 8))
    """Readings that a spike is compared with (OLMo-core); a quarter of them must be there first."""

    update_ratio_high: float = setting(-1.7, as_real)
    """log10 of the size of updates over that of weights, above which a matrix moves too fast: 2 % a step. The usual
    guide is -3 (Karpathy; the course cs231n); the band around it is our proposal."""

    update_ratio_low: float = setting(-5.0, as_real)
    """log10 of the size of updates over that of weights, below which a matrix hardly moves. Told as INFO only: at the
    end of every decaying learning rate and in most fine-tuning, healthy weights lie there."""

    update_ratio_checks: int = setting(50, lambda value: as_whole(value, 1))
    """Readings in a row on which the ratio must lie outside its band."""

    dead_fraction_warn: float = setting(0.10, lambda value: as_real(value, 0.0, 1.0))
    """Share of dead units of a layer from which on it is told (keras-contrib's DeadReluDetector)."""

    dead_fraction_crit: float = setting(0.50, lambda value: as_real(value, 0.0, 1.0))
    """Share of dead units from which on it is critical, after two windows in a row (SageMaker Debugger's DeadRelu)."""

    saturated_fraction_warn: float = setting(0.20, lambda value: as_real(value, 0.0, 1.0))
    """Mean share of samples on which the units of a tanh or sigmoid are flat, from which on it is told; a few percent
    are healthy (Karpathy), the number is our proposal. The last module is exempt: a sure answer is saturated."""

    saturated_fraction_crit: float = setting(0.50, lambda value: as_real(value, 0.0, 1.0))
    """The same, critical, after two windows in a row."""

    activation_depth_ratio: float = setting(1000.0, lambda value: as_real(value, 1.0))
    """Largest over smallest root mean square of the activations of layers of one role, where it rises or falls from
    layer to layer. SageMaker Debugger's PoorWeightInitialization takes 10 of any layers; that accuses every residual
    stream, whose size grows with depth, and pretrained language models by a factor of hundreds."""

    gradient_depth_ratio: float = setting(100.0, lambda value: as_real(value, 1.0))
    """The same for gradients (our proposal)."""

    depth_checks: int = setting(5, lambda value: as_whole(value, 1))
    """Readings over which sizes through depth are averaged before they are compared."""

    vanishing_gradient_rms: float = setting(1e-7, lambda value: as_real(value, 0.0))
    """Root mean square below which a gradient that vanishes through depth is critical (SageMaker Debugger's
    VanishingGradient takes the mean magnitude). Alone it accuses biases before a normalisation, whose gradients are
    zero by theory and a rounding error in practice."""

    unused_checks: int = setting(10, lambda value: as_whole(value, 1))
    """Readings in a row on which a parameter must have had no gradient; some parts are used on some steps only."""

    unchanged_checks: int = setting(3, lambda value: as_whole(value, 1))
    """Readings in a row on which a parameter that has a gradient must not have changed (SageMaker Debugger's
    UnchangedTensor)."""

    subnormal_fraction: float = setting(0.5, lambda value: as_real(value, 0.0, 1.0))
    """Share of the values of a gradient in a narrow format that are too small for its normal numbers, so that they
    have lost digits and smaller ones have become zero. Our proposal: half, since then the bulk of the gradient is
    affected; a few percent of very small values are ordinary."""

    range_fraction: float = setting(0.5, lambda value: as_real(value, 0.0, 1.0))
    """Share of the range of float16 from which on an activation or a parameter is close to infinity (our proposal: a
    factor of two). Gradients are exempt, since scalers drive them there on purpose."""

    clipped_fraction: float = setting(0.5, lambda value: as_real(value, 0.0, 1.0))
    """Share of the readings of a window whose gradient norm is the same maximum, from which on clipping is told."""

    outlier_abs_max: float = setting(100.0, lambda value: as_real(value, 0.0))
    """Magnitude from which on an activation may be an outlier (Sun et al. 2024, massive activations)."""

    outlier_ratio: float = setting(100.0, lambda value: as_real(value, 1.0))
    """Largest magnitude over root mean square from which on it is one. Sun et al. take 1000 times the median, which
    scalars do not tell; the root mean square is larger than the median, the more so the larger the outlier."""
