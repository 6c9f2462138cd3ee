"""What is selected in a model, and the sketches of the step that goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import nn

from instrument.capture.names import MODULE_KINDS, ModuleEntry, Selection, Site, select
from instrument.capture.parameters import Parameters
from instrument.capture.patterns import Patterns
from instrument.config import Config
from instrument.errors import UnmeasurableError
from instrument.measure.custom_op import measure
from instrument.measure.sketch import Sketch
from instrument.record.buffer import Buffer, StepRecord
from instrument.torch_private import version_of
from instrument.watcher.notices import Notices, place_of

__all__ = ["Collector", "Pairs"]

Pairs: TypeAlias = "list[tuple[str, nn.Parameter]]"
"""Names and parameters."""


class Collector:
    """Measures what is selected of one model into the record of a step.

    Args:
        model: The model; only a weak reference is kept.
        config: The settings.
        patterns: What is included and excluded.
        notices: Told of what cannot be measured.
    """

    def __init__(self, model: nn.Module, config: Config, patterns: Patterns, notices: Notices) -> None:
        self.buffer = Buffer(config.history)
        self.parameters = Parameters()
        self._model = weakref.ref(model)
        self._kinds = config.kinds
        self._patterns = patterns
        self._notices = notices
        self._sites: tuple[Site, ...] = ()
        self._outputs: dict[Site, dict[Site, None]] = {}
        self._last: tuple[weakref.ref[torch.Tensor], int, Sketch] | None = None
        self.select()

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is watched; a module with several outputs stands for each of them once it has run."""
        return tuple(site for base in self._sites for site in self._outputs.get(base, (base,)))

    def watched_modules(self) -> list[str]:
        """Names of the modules whose activations are selected."""
        return [site.name for site in self._sites if site.kind == "activations"]

    def wants_kind(self, kind: str) -> bool:
        """Whether anything of this kind is watched."""
        return kind in self._kinds

    def wants(self, site: Site) -> bool:
        """Whether this site is watched."""
        return site.kind in self._kinds and self._patterns.match(site.name) and not self._notices.is_broken(site)

    def select(self) -> tuple[ModuleEntry, ...]:
        """Look at the model as it is now; returns the selected modules."""
        model = self._model()
        if model is None:  # the parameters selected last stand, for the last step to be logged
            return ()
        selection = select(model, self._patterns, self._kinds)
        self.parameters.select(selection.parameters)
        self._sites = tuple(self._sites_of(selection))
        return selection.modules

    def _sites_of(self, selection: Selection) -> Iterator[Site]:
        for entry in selection.modules:
            yield from (Site(kind, entry.name) for kind in self._kinds if kind in MODULE_KINDS)
        for place in selection.parameters:
            yield from (Site(kind, place.name) for kind in self._kinds if kind not in MODULE_KINDS)

    def every_parameter(self) -> list[nn.Parameter]:
        """All parameters of the model, selected or not."""
        model = self._model()
        return list(model.parameters()) if model is not None else []

    def take(self, site: Site, tensor: torch.Tensor) -> Sketch | None:
        """Measure a tensor; None where that cannot be done."""
        try:
            sketch = self._measure(tensor)
        except UnmeasurableError as error:
            self._notices.say(f"{place_of(site)} are not measured: {error}")
            return None
        except Exception as error:
            self._notices.failed(place_of(site), error)
            return None
        base, bracket, _ = site.name.partition("[")
        if bracket:
            self._outputs.setdefault(Site(site.kind, base), {})[site] = None
        return sketch

    def _measure(self, tensor: torch.Tensor) -> Sketch:
        """Measure, unless it is the tensor measured last: a container returns what its last child returned."""
        remembered = self._last
        if remembered is not None and remembered[0]() is tensor and remembered[1] == version_of(tensor):
            return remembered[2]
        sketch = measure(tensor)
        if type(tensor) is torch.Tensor and not tensor.is_inference():  # parameters must not be referred to weakly
            version = version_of(tensor)
            self._last = (weakref.ref(tensor), version, sketch) if version is not None else None
        return sketch

    def open(self, step: int) -> None:
        """Begin the record of a step, or go on with it."""
        if self.buffer.step is None:
            self.select()
        self.buffer.open(step)

    def close(self) -> StepRecord | None:
        """End the record, with the parameters that no optimizer has moved; None where there is nothing new."""
        self.add_missing(self.parameters.values(self.parameters.of()))
        return self.buffer.close()

    def add(self, tensors: Iterable[tuple[Site, torch.Tensor]]) -> None:
        """Measure tensors into the record."""
        for site, tensor in tensors:
            if self.wants(site):
                sketch = self.take(site, tensor)
                if sketch is not None:
                    self.buffer.add(site, sketch)

    def add_missing(self, tensors: Iterable[tuple[Site, torch.Tensor]]) -> None:
        """Measure those tensors into the record that it lacks."""
        self.add((site, tensor) for site, tensor in tensors if not self.buffer.has(site))

    def add_what_is_there(self) -> None:
        """Gradients and parameters, where no optimizer says which are its own."""
        pairs = self.parameters.of()
        self.add_missing(self.parameters.gradients(pairs))
        self.add_missing(self.parameters.values(pairs))

    def add_measured(self, measured: Iterable[tuple[Site, Sketch | None]], scale: torch.Tensor | None) -> None:
        """Add what hooks have measured.

        Args:
            measured: Site and sketch; None for what could not be measured inside of a graph.
            scale: What a gradient scaler has multiplied gradients by, of shape ().
        """
        for site, sketch in measured:
            if sketch is None:
                self._notices.say(f"{place_of(site)} could not be measured inside the graph")
            elif scale is not None and site.kind == "activation_gradients":
                self.buffer.add(site, sketch.divided(float(scale)))
            else:
                self.buffer.add(site, sketch)
