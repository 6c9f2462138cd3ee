"""The layout of TensorBoard's CUSTOM SCALARS: the curves that tell a healthy network from a sick one, side by side.

TensorBoard merges the layouts of all runs by the titles of categories and charts, so every run is given the same one.
The tags of a chart are regular expressions, matched from the start of a tag.
"""

from __future__ import annotations

import re

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

__all__ = ["CHARTS", "GUIDE", "UPDATE_RATIO_GUIDE", "health_layout", "layout_value"]

UPDATE_RATIO_GUIDE = -3.0
"""log10 of the update-to-weight ratio that is often healthy: Karpathy, "makemore" part 3, 2022."""

GUIDE = "_guide"
"""Name of the constant curve in the section `Updates.log10_ratio`."""

CATEGORY = "Health"
CHARTS = {
    "dead units, share of a layer": "Activations.dead_fraction/",
    "saturated samples, share of a layer": "Activations.saturated_fraction/",
    f"log10 of update to weight, guide at {UPDATE_RATIO_GUIDE:.0f}": "Updates.log10_ratio/",
    "gradients, rms": "Gradients.rms/",
    "activations, rms": "Activations.rms/",
}
"""Title of each chart, and what the tags in it begin with."""


def health_layout() -> layout_pb2.Layout:
    r"""The layout, which depends on nothing.

    Returns:
        One category with a chart for each of `CHARTS`.

    Example:
        >>> health_layout().category[0].chart[0].multiline.tag[0]
        'Activations\\.dead_fraction/'
    """
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[re.escape(prefix)]))
        for title, prefix in CHARTS.items()
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title=CATEGORY, chart=charts)])


def layout_value() -> Summary.Value:
    """The layout as TensorBoard reads it, to be written once a run.

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
        tensor=TensorProto(dtype=DT_STRING, string_val=[health_layout().SerializeToString()]),
    )
