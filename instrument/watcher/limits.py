"""What is said when a watch begins about what it cannot show, or costs."""

from __future__ import annotations

from torch import nn

from instrument.capture.shards import Shards
from instrument.record.ranks.group import Position, position
from instrument.watcher.notices import Notices

__all__ = ["tell_of_limits"]


def tell_of_limits(
    notices: Notices, model: nn.Module | None, shards: Shards | None, place: Position, ranks: str
) -> None:
    """Say where what is recorded is one part of several, and where a hook costs a fast path.

    Args:
        notices: Told of it.
        model: The model.
        shards: What of each tensor lies on this rank; None where there was one rank alone when the watch was made.
        place: Which rank this was then, of how many.
        ranks: The setting: which ranks write.
    """
    if isinstance(model, nn.TransformerEncoderLayer):
        notices.say(
            "a TransformerEncoderLayer that is watched by itself is evaluated by its plain path before sampled "
            "steps, since its fused one refuses any hook on it; watch the model that it is part of"
        )
    if shards is None:
        if position().world > 1:
            notices.say(
                "watch() was called before init_process_group(), so every rank measures and writes a run of its "
                "own; call it afterwards"
            )
    elif ranks != "merge":
        notices.sharded(shards.sharded(), shards.empty(), place.rank, place.world)
