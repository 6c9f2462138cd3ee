"""Tags: what a sketch is called in TensorBoard, and which of its statistics are shown as scalars.

TensorBoard groups by the text before the first slash, so a section is one kind and statistic with the layers
side by side: ``Gradients/{name}`` for histograms, ``Gradients.log10/{name}`` for those of log10 of magnitudes,
``Gradients.rms/{name}`` for scalars. Names keep their dots: what a tag shows can be pasted into ``include=``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from instrument.capture.names import Site
from instrument.config import SECTIONS
from instrument.measure.sketch import Sketch

__all__ = ["COUNTS", "LOG10", "LOG10_KINDS", "STATISTICS", "Tag", "parse_tag", "tag_of"]

LOG10 = "log10"
"""Stands where a statistic stands, for histograms of log10 of magnitudes."""

LOG10_KINDS = frozenset({"activation_gradients", "gradients", "updates"})
"""Kinds whose values spread over decades and are a mere spike on a linear axis."""

STATISTICS: Mapping[str, Callable[[Sketch], float]] = MappingProxyType(
    {
        "rms": lambda sketch: sketch.rms,
        "mean": lambda sketch: sketch.mean,
        "std": lambda sketch: sketch.std,
        "abs_max": lambda sketch: sketch.abs_max,
        "zero_fraction": lambda sketch: sketch.zero_fraction,
    }
)
"""Scalars of every sketch that has a finite value."""

COUNTS: Mapping[str, Callable[[Sketch], int]] = MappingProxyType(
    {
        "nan_count": lambda sketch: sketch.nan_count,
        "inf_count": lambda sketch: sketch.inf_count,
    }
)
"""Scalars of sketches for which they were ever above zero: absent means never."""

_KINDS = {section: kind for kind, section in SECTIONS.items()}


class Tag(NamedTuple):
    """A tag of ours, taken apart."""

    kind: str
    statistic: str | None
    """Name of a statistic, `LOG10`, or None for the histogram of the values."""
    name: str


def tag_of(site: Site, statistic: str | None = None) -> str:
    """The tag of a site's histogram, or of one of its statistics.

    Args:
        site: Kind and name.
        statistic: Name of a statistic, `LOG10`, or None for the histogram of the values.

    Returns:
        The tag.

    Example:
        >>> tag_of(Site("gradients", "head.weight"), "rms")
        'Gradients.rms/head.weight'
    """
    section = SECTIONS[site.kind]
    return f"{section}/{site.name}" if statistic is None else f"{section}.{statistic}/{site.name}"


def parse_tag(tag: str) -> Tag | None:
    """Take a tag apart; None where it is none of ours.

    Args:
        tag: Any tag in an event file.

    Returns:
        Kind, statistic and name.

    Example:
        >>> parse_tag("Activations.rms/blocks.0")
        Tag(kind='activations', statistic='rms', name='blocks.0')
    """
    head, slash, name = tag.partition("/")
    section, _, statistic = head.partition(".")
    kind = _KINDS.get(section)
    if kind is None or not slash or not name:
        return None
    return Tag(kind, statistic or None, name)
