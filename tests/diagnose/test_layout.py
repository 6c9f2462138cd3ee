"""The layout of CUSTOM SCALARS, as TensorBoard's own plugin reads it back."""

from __future__ import annotations

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.layout import CHARTS, health_layout, layout_value
from instrument.diagnose.readings import GUIDE
from instrument.record.tags import tag_of

from .statuses import write_values


def test_tensorboard_finds_the_layout_in_a_run(tmp_path: Path) -> None:
    """What is written is what the plugin of CUSTOM SCALARS looks up, and reads as the same layout."""
    write_values(tmp_path, {0: [layout_value()]})
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert list(accumulator.PluginTagToContent(metadata.PLUGIN_NAME)) == [metadata.CONFIG_SUMMARY_TAG]
    (event,) = accumulator.Tensors(metadata.CONFIG_SUMMARY_TAG)
    assert layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]) == health_layout()


def test_charts_that_would_stay_empty_are_left_out() -> None:
    """By default no update is watched, so there is no chart of updates; the others are the same in every layout."""
    whole = {chart.title: chart for chart in health_layout().category[0].chart}
    assert list(whole) == list(CHARTS)
    usual = list(health_layout(Config().kinds).category[0].chart)
    assert [chart.title for chart in usual] == [title for title in CHARTS if "update" not in title]
    assert all(whole[chart.title] == chart for chart in usual)
    (alone,) = health_layout(["updates"]).category[0].chart
    assert "guide at -3" in alone.title


def test_charts_take_their_own_tags_and_no_others() -> None:
    """Each tag belongs to one chart, matched as the plugin does, from the start; names may hold anything."""
    charts = [re.compile(chart.multiline.tag[0]) for chart in health_layout().category[0].chart]
    ours = [
        "Activations.dead_fraction/blocks.0.relu",
        "Activations.saturated_fraction/blocks.0.relu",
        "Updates.log10_ratio/head.weight",
        tag_of(Site("gradients", "head.weight"), "rms"),
        tag_of(Site("activations", "blocks.0[1]"), "rms"),
    ]
    assert [[bool(chart.match(tag)) for chart in charts] for tag in ours] == [
        [chart == place for chart in range(5)] for place in range(5)
    ]
    assert charts[2].match(f"Updates.log10_ratio/{GUIDE}")
    others = ("ActivationGradients.rms/a", "Gradients.rms", "ActivationsXdead_fraction/a", "loss/Gradients.rms/a")
    assert not any(chart.match(tag) for chart in charts for tag in others)
