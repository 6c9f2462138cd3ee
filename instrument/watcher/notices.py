"""What could not be observed, and why: each said once, and faults of ours kept from happening again."""

from __future__ import annotations

from collections.abc import Iterable

from instrument.capture.names import Site
from instrument.errors import warn_quietly
from instrument.record.tags import tag_of

__all__ = ["Notices", "place_of"]

NAMES_IN_A_NOTICE = 12


class Notices:
    """Collects notices, and the places where this library failed.

    Args:
        strict: Whether faults of ours are raised instead of told.
    """

    def __init__(self, strict: bool) -> None:
        self.texts: list[str] = []
        """What was said, in order."""
        self._strict = strict
        self._told: set[str] = set()
        self._broken: set[str] = set()
        self.faults = 0
        """How often this library has failed so far."""

    def say(self, text: str) -> None:
        """Say something once, as a notice and as a warning."""
        if text not in self._told:
            self._told.add(text)
            self.texts.append(text)
            warn_quietly(text, stacklevel=4)

    def failed(self, place: str, error: Exception) -> None:
        """Tell of a fault of ours, and leave that place out from now on; raise it in strict mode."""
        if self._strict:
            raise error
        self._broken.add(place)
        self.faults += 1
        self.say(f"{place}: this library failed with {type(error).__name__}: {error}; it is left out from now on")

    def is_broken(self, site: Site) -> bool:
        """Whether this library failed at a site, or at the module or parameter it belongs to."""
        if not self._broken:
            return False
        return not self._broken.isdisjoint((site.name, site.name.partition("[")[0], place_of(site)))

    def no_step(self, backwards: int) -> None:
        """Say that gradients came and went, and no step was seen."""
        self.say(
            f"no optimizer step was seen in {backwards} backward passes, so no step is counted: call watcher.step() at "
            "the end of each step, or give optimizer= to watch()"
        )

    def never_called(self, names: Iterable[str]) -> None:
        """Say which of the selected modules were not called in the first sampled step."""
        listed = _listed(names)
        if listed:
            self.say(
                f"never called in the first sampled step, so without activations: {listed}; a parent that uses their "
                "weights itself, model.forward() instead of model(), the fused path of a frozen "
                "nn.TransformerEncoderLayer, or a function that was compiled before the watch began passes them by, "
                'and with compiled="graph" a model in evaluation mode does'
            )

    def inside_graph(self, names: Iterable[str]) -> None:
        """Say which of the selected modules are part of a compiled graph."""
        listed = _listed(names)
        if listed:
            self.say(
                f"inside a region of torch.compile, so without activations: {listed}; parameters and gradients are "
                'complete; watch(..., compiled="eager") or "graph" observes them'
            )

    def cut_short(self, step: int | None, called: Iterable[str], tags: Iterable[str]) -> None:
        """Say what a step lacks that an exception left while it ran uncompiled.

        Args:
            step: Its number.
            called: The modules that were called in it or before.
            tags: Those of its record.
        """
        found = {tag.partition("[")[0] for tag in tags}
        listed = _listed(name for name in sorted(called) if tag_of(Site("activations", name)) not in found)
        if listed:
            self.say(
                f"an exception left the model in step {step}, which was sampled uncompiled: what came after it ran "
                f"compiled, so that step lacks the activations of {listed}"
            )

    def sharded(self, names: list[str], empty: list[str], rank: int, world: int) -> None:
        """Say which parameters are seen in part."""
        if names:
            without = f"; nothing of {_listed(empty)} lies here" if empty else ""
            self.say(
                f"values are those of one shard of several, rank {rank}'s of {world}, for {_listed(names)}{without}; "
                'watch(..., ranks="merge") sees all'
            )


def _listed(names: Iterable[str]) -> str:
    """Names behind commas, the first of many."""
    every = list(names)
    more = len(every) - NAMES_IN_A_NOTICE
    return ", ".join(every[:NAMES_IN_A_NOTICE]) + (f" and {more} more" if more > 0 else "")


def place_of(site: Site) -> str:
    """A site in words.

    Example:
        >>> place_of(Site("gradients", "head.weight"))
        'gradients of head.weight'
    """
    return f"{site.kind} of {site.name}"
