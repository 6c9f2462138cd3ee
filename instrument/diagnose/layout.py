"""The layout of TensorBoard's CUSTOM SCALARS: the curves that tell a healthy network from a sick one, side by side.

TensorBoard merges the layouts of all runs by the titles of categories and charts, so the same chart has the same title
in every run.
The tags of a chart are regular expressions, matched from the start of a tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from instrument.config import KINDS
from instrument.diagnose.readings import LOG10_RATIO, UPDATE_GUIDE

__all__ = ["CHARTS", "health_layout", "layout_value"]

CATEGORY = "Health"
CHARTS = {
    "dead units, share of a layer": ("Activations.dead_fraction/", frozenset({"activations", "gradients"})),
    "saturated samples, share of a layer": ("Activations.saturated_fraction/", frozenset({"activations"})),
    f"log10 of update to weight, guide at {UPDATE_GUIDE:.0f}": (f"Updates.{LOG10_RATIO}/", frozenset({"updates"})),
    "gradients, rms": ("Gradients.rms/", frozenset({"gradients"})),
    "activations, rms": ("Activations.rms/", frozenset({"activations"})),
}
"""Title of each chart, what the tags in it begin with, and the kinds of which any gives such tags."""


def health_layout(kinds: Iterable[str] = KINDS) -> layout_pb2.Layout:
    r"""The layout.

    Args:
        kinds: What is watched; charts that would stay empty are left out.

    Returns:
        One category with some of `CHARTS`.

    Example:
        >>> health_layout().category[0].chart[0].multiline.tag[0]
        'Activations\\.dead_fraction/'
    """
    watched = frozenset(kinds)
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[re.escape(prefix)]))
        for title, (prefix, givers) in CHARTS.items()
        if not watched.isdisjoint(givers)
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title=CATEGORY, chart=charts)])


def layout_value(kinds: Iterable[str] = KINDS) -> Summary.Value:
    """The layout as TensorBoard reads it, to be written once a run.

    Args:
        kinds: As for `health_layout`.

    Returns:
        A value under the tag that CUSTOM SCALARS looks for.

    Example:
        >>> layout_value().tag
        'custom_scalars__config__'
    """
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    return Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype=DT_STRING, string_val=[health_layout(kinds).SerializeToString()]),
    )
