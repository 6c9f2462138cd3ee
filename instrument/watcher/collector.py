"""What is selected in a model, and the sketches of the step that goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from instrument.capture.names import MODULE_KINDS, ModuleEntry, Site
from instrument.capture.parameters import Parameters
from instrument.capture.patterns import Patterns
from instrument.capture.selector import Selector
from instrument.capture.shards import Shards
from instrument.config import Config
from instrument.errors import UnmeasurableError
from instrument.measure.batch import Batch, measure_later
from instrument.measure.device import CapturingError, LateNumber, edge_for, is_capturing
from instrument.measure.pending import Divided, Pending
from instrument.measure.sketch import Sketch
from instrument.measure.units import DeviceTally, UnitTally
from instrument.record.buffer import Buffer, StepRecord, Traits
from instrument.record.ranks.group import position
from instrument.torch_private import Unseen, version_of, when_backward_ends
from instrument.watcher.notices import Notices, place_of
from instrument.watcher.units import UnitJudge

__all__ = ["Collector", "Pairs"]

Pairs: TypeAlias = "list[tuple[str, nn.Parameter]]"
"""Names and parameters."""

Measured: TypeAlias = "Sketch | Pending | UnitTally | DeviceTally | int | None"
"""What came of looking at a tensor or at the call of a module."""


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
        self._selector = Selector(model, patterns, config.kinds)
        self._kinds = config.kinds
        self._patterns = patterns
        self._notices = notices
        self._outputs: dict[Site, dict[Site, None]] = {}
        self._ranks = config.ranks
        self._place = position()
        self.shards = Shards() if self._place.world > 1 else None
        """What of each tensor lies on this rank; None where there is one rank alone."""
        self.units = UnitJudge(config.functions, self.wants, notices.say)
        self._samples = 0
        self._has_seen_capturing = False
        self._sample_above = config.histogram_sample_above
        self._batch = Batch(self._sample_above)
        self._kept: dict[Site, Sketch | Pending] = {}
        self._kept_for: int | None = None
        self._is_end_awaited = False
        self._last: tuple[weakref.ref[torch.Tensor], int, Sketch | Pending] | None = None
        self.select()

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is watched; a module with several outputs stands for each of them once it has run."""
        return tuple(site for base in self._bases() for site in self._outputs.get(base, (base,)))

    def watched_modules(self) -> list[str]:
        """Names of the modules whose activations are selected."""
        return list(self._selector.module_names) if "activations" in self._kinds else []

    def wants_kind(self, kind: str) -> bool:
        """Whether anything of this kind is watched."""
        return kind in self._kinds

    def wants(self, site: Site) -> bool:
        """Whether this site is watched."""
        return site.kind in self._kinds and self._patterns.match(site.name) and not self._notices.is_broken(site)

    def select(self) -> tuple[ModuleEntry, ...]:
        """Look at the model as it is now; returns the selected modules."""
        modules = self._selector.select()
        model = self._model()
        self.parameters.select(self._selector.parameters)
        if self._selector.is_new and model is not None:
            self.units.select(modules, self._selector.last_layer)
            if self.shards is not None:
                self.shards.select(model, self._selector.parameters)
        return modules

    def modules(self) -> tuple[ModuleEntry, ...]:
        """The selected modules, as the model is now."""
        return self.select() if MODULE_KINDS.intersection(self._kinds) else ()

    def _bases(self) -> Iterator[Site]:
        """What is selected; a module stands for all its outputs."""
        for name in self._selector.module_names:
            yield from (Site(kind, name) for kind in self._kinds if kind in MODULE_KINDS)
        for place in self._selector.parameters:
            yield from (Site(kind, place.name) for kind in self._kinds if kind not in MODULE_KINDS)

    def every_parameter(self) -> list[nn.Parameter]:
        """All parameters of the model, selected or not."""
        model = self._model()
        return list(model.parameters()) if model is not None else []

    def sees_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, so that nothing is to be measured; that is said."""
        if not is_capturing():
            return False
        self._has_seen_capturing = True
        self._notices.say(str(CapturingError()))
        return True

    def has_seen_capturing(self) -> bool:
        """Whether a graph was captured since this was last asked: what it captured was not seen."""
        found, self._has_seen_capturing = self._has_seen_capturing, False
        return found

    def take(self, site: Site, tensor: torch.Tensor) -> Sketch | Pending | None:
        """Measure a tensor as it is now, at once or later; None where that cannot be done."""
        try:
            if self.shards is not None:
                tensor = self.shards.own(site, tensor)
            sketch = self._measure(tensor)
        except Exception as error:
            self._cannot(site, error)
            return None
        self._note(site, tensor)
        base, bracket, _ = site.name.partition("[")
        if bracket:
            self._outputs.setdefault(Site(site.kind, base), {})[site] = None
        return sketch

    def _cannot(self, site: Site, error: Exception) -> None:
        """Tell why a tensor was not measured."""
        if isinstance(error, CapturingError):
            self._notices.say(str(error))
        elif isinstance(error, UnmeasurableError):
            self._notices.say(f"{place_of(site)} are not measured: {error}")
        else:
            self._notices.failed(place_of(site), error)

    def _measure(self, tensor: torch.Tensor) -> Sketch | Pending:
        """Measure, unless it is the tensor measured last: a container returns what its last child returned."""
        remembered = self._last
        if remembered is not None and remembered[0]() is tensor and remembered[1] == version_of(tensor):
            return remembered[2]
        sketch = self._batch.add(tensor)
        if type(tensor) is torch.Tensor and not tensor.is_inference():  # parameters must not be referred to weakly
            version = version_of(tensor)
            self._last = (weakref.ref(tensor), version, sketch) if version is not None else None
        return sketch

    def is_counted(self, site: Site) -> bool | None:
        """Whether what this rank measures at a site belongs into a sum over ranks; None where it cannot tell."""
        return self.shards.is_counted(site) if self.shards is not None else True

    def tell_of_limits(self) -> None:
        """Say where what is recorded is one part of several, and where a hook costs a fast path."""
        if isinstance(self._model(), nn.TransformerEncoderLayer):
            self._notices.say(
                "a TransformerEncoderLayer that is watched by itself is evaluated by its plain path before sampled "
                "steps, since its fused one refuses any hook on it; watch the model that it is part of"
            )
        if self.shards is None:
            if position().world > 1:
                self._notices.say(
                    "watch() was called before init_process_group(), so every rank measures and writes a run of its "
                    "own; call it afterwards"
                )
        elif self._ranks != "merge":
            self._notices.sharded(self.shards.sharded(), self.shards.empty(), self._place.rank, self._place.world)

    def open(self, step: int) -> None:
        """Begin the record of a step, or go on with it."""
        if self.buffer.step is None:
            self.select()
            self._samples = 0
        self.buffer.open(step)

    def close(self) -> StepRecord | None:
        """End the record, with the parameters that no optimizer has moved; None where there is nothing new."""
        self.add(self.parameters.lacking(self.buffer.has))
        for name, tally in self.units.silent(self.buffer.units()):
            self.buffer.add_units(name, tally)
        self._batch.cut()
        return self.buffer.close()

    def add(self, tensors: Iterable[tuple[Site, torch.Tensor]], are_made_for_us: bool = False) -> None:
        """Measure tensors into the record; see `measure_later` for those that nobody else holds."""
        if self.sees_capturing():
            return
        sites: list[Site] = []
        wanted = self._wanted(tensors, sites)
        measured = measure_later(wanted, self._sample_above, self._batch.devices, are_made_for_us)
        for site, found in zip(sites, measured, strict=True):
            if isinstance(found, Exception):
                self._cannot(site, found)
            else:
                self.buffer.add(site, found)

    def _wanted(self, tensors: Iterable[tuple[Site, torch.Tensor]], sites: list[Site]) -> Iterator[torch.Tensor]:
        """The tensors that are watched; their sites are added to those given."""
        kinds, is_broken = self._kinds, self._notices.is_broken
        for site, tensor in tensors:  # their names are those that were selected
            if site.kind in kinds and not is_broken(site):
                if site.kind == "gradients" and self.units.has_rows(site.name):
                    self._add_rows(site.name, tensor)
                self._note(site, tensor)
                sites.append(site)
                yield tensor if self.shards is None else self.shards.own(site, tensor)

    def _note(self, site: Site, tensor: torch.Tensor) -> None:
        """Note what a tensor is besides its values; of most sites that is the same each step."""
        traits = self.buffer.traits.get(site)
        if (
            traits is None
            or traits.dtype is not tensor.dtype
            or traits.ndim != tensor.ndim
            or traits.requires_grad is not tensor.requires_grad
            or traits.scale != 1.0
        ):
            self.buffer.traits[site] = Traits(tensor.dtype, tensor.ndim, tensor.requires_grad)

    def _add_rows(self, parameter: str, gradient: torch.Tensor) -> None:
        """Tally the rows of a gradient, where they are what tells of the units behind it.

        Their samples are those that the module itself was seen to return, else those of the model's first output; where
        neither was seen the step counts as one sample, which says less than there was.
        """
        samples = self.buffer.samples_of(parameter.rpartition(".")[0]) or self._samples or 1
        try:
            tally = self.units.rows(parameter, gradient, samples)
        except Exception as error:
            self._notices.failed(f"units of {parameter}", error)
            return
        if tally is not None:
            self.buffer.add_units(parameter, tally)

    def judge(self, name: str, inputs: Any, output: Any) -> tuple[Site, UnitTally | DeviceTally | int] | None:
        """Tally the units of a module that has returned; see `UnitJudge.judge`."""
        if self._notices.is_broken(Site("units", name)):
            return None
        try:
            found = self.units.judge(name, inputs, output)
        except Exception as error:
            self._notices.failed(f"units of {name}", error)
            return None
        return (Site("units", found[0]), found[1]) if found is not None else None

    def add_gradients(self, pairs: Pairs, scale: torch.Tensor | None) -> None:
        """Measure the gradients of these parameters, which a fused optimizer will divide by a scale itself."""
        self.add(self.parameters.gradients(pairs, scale), scale is not None)

    def add_missing(self, tensors: Iterable[tuple[Site, torch.Tensor]]) -> None:
        """Measure those tensors into the record that it lacks."""
        self.add((site, tensor) for site, tensor in tensors if not self.buffer.has(site))

    def forget(self, pairs: Pairs) -> None:
        """Forget what the step has of these parameters and their gradients."""
        for name, _ in pairs:
            self.buffer.discard(Site("gradients", name))
            self.buffer.discard(Site("parameters", name))

    def look_for_hidden_gradients(self, pairs: Pairs) -> None:
        """At a step, after gradients flowed back: has yet no parameter one?"""
        if pairs and all(parameter.grad is None for _, parameter in pairs):
            self._notices.say(
                "the optimizer steps, but no parameter has a .grad: this engine does not expose gradients, so none are "
                "recorded"
            )

    def are_gradients_gone(self) -> bool:
        """Whether no gradient is left, as far as the first few tell."""
        gradients = [p.grad for p in self.every_parameter() if p.grad is not None]
        return all(_is_cleared(gradient) for gradient in gradients[:4])

    def await_gradients(self, step: int) -> None:
        """In a backward pass: measure the gradients at its end, before a loop without an optimizer clears them."""
        self._kept_for = step
        if self.wants_kind("gradients") and not self._is_end_awaited:
            self._is_end_awaited = when_backward_ends(self._keep_gradients)

    def _keep_gradients(self) -> None:
        self._is_end_awaited = False
        self._kept.clear()
        try:
            found = [pair for pair in self.parameters.gradients(self.parameters.of()) if self.wants(pair[0])]
            own = [tensor if self.shards is None else self.shards.own(site, tensor) for site, tensor in found]
            for (site, tensor), sketch in zip(found, measure_later(own, self._sample_above), strict=True):
                if isinstance(sketch, Exception):
                    self._cannot(site, sketch)
                else:
                    self._kept[site] = sketch
                    self._note(site, tensor)
        except Exception as error:
            self._notices.failed("gradients", error)

    def add_what_is_there(self, step: int) -> None:
        """Gradients and parameters, where no optimizer says which are its own.

        A gradient that is zero was cleared after its use: what the last backward pass of the step left counts instead,
        and where that is not known it is absent.
        """
        pairs = self.parameters.of()
        self.add_missing(pair for pair in self.parameters.gradients(pairs) if not _is_cleared(pair[1]))
        for site, sketch in self._kept.items() if self._kept_for == step else ():
            if not self.buffer.has(site):
                self.buffer.add(site, sketch)
        self._kept.clear()
        self._is_end_awaited = False
        self.add_missing(self.parameters.values(pairs))

    def add_measured(self, measured: Iterable[tuple[Site, Measured]], scale: torch.Tensor | None) -> None:
        """Add what hooks have measured.

        Args:
            measured: Site and sketch, or tally of units, or number of samples of a pass; None for what could not be
                measured inside of a graph.
            scale: What a gradient scaler has multiplied gradients by, of shape ().
        """
        divisor: float | LateNumber | None = None
        for site, item in measured:
            if isinstance(item, (UnitTally, DeviceTally)):
                self.buffer.add_units(site.name, item)
                continue
            if isinstance(item, int):
                self._samples += item
                continue
            if item is None:
                self._notices.say(f"{place_of(site)} could not be measured inside the graph")
                continue
            if scale is not None and site.kind == "activation_gradients":
                divisor = divisor or (float(scale) if edge_for(scale.device) is None else LateNumber(scale))
                self.buffer.divide(site, divisor)
                item = Divided(item, divisor)
            self.buffer.add(site, item)


def _is_cleared(gradient: torch.Tensor) -> bool:
    """Whether all of a gradient is zero; of kinds that cannot tell, or not without a wait for a device, it is not."""
    if not gradient.is_cpu:
        return False
    try:
        with Unseen():
            return gradient.numel() > 0 and not bool(gradient.count_nonzero())
    except Exception:
        return False
