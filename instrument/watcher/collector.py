"""What is selected in a model, and the sketches of the step that goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from instrument.capture.names import MODULE_KINDS, ModuleEntry, Site, site_of
from instrument.capture.parameters import Pairs, Parameters, is_cleared
from instrument.capture.patterns import Patterns
from instrument.capture.selector import Selector
from instrument.capture.shards import Shards
from instrument.config import Config
from instrument.errors import UnmeasurableError
from instrument.measure.batch import Batch, Column, measure_later
from instrument.measure.device import CapturingError, LateNumber, edge_for, is_capturing
from instrument.measure.groups import ArrivingGroup
from instrument.measure.pending import ALONE, Divided, Pending
from instrument.measure.sketch import Sketch
from instrument.record.buffer import Buffer, StepRecord
from instrument.record.ranks.group import position
from instrument.torch_private import Unseen, version_of, when_backward_ends
from instrument.watcher.limits import tell_of_limits
from instrument.watcher.notices import Notices, place_of
from instrument.watcher.rows import RowTallies
from instrument.watcher.units import UnitJudge
from instrument.watcher.updates import Updates

__all__ = ["Collector"]


_Remembered: TypeAlias = "tuple[weakref.ref[torch.Tensor], int, Sketch | Pending | ArrivingGroup, int]"
"""A tensor, how often it was changed in place before it was measured, and what `Batch.put` gave for it."""


_CHANGE = torch.empty(0, dtype=torch.float64)
"""A tensor as each change of a parameter is one."""


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
        self._updates = Updates(self.parameters)
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
        self._batch = Batch(config.histogram_sample_above)
        self.units = UnitJudge(config.functions, self.wants, notices.say, self._copied, self._batch.devices)
        self._rows = RowTallies(self.units, self.buffer, notices, self._batch.devices)
        self._samples = 0
        self._has_seen_capturing = False
        self._sample_above = config.histogram_sample_above
        self._wanted_sites: dict[Site, bool] = {}
        self._faults = 0
        self._kept: dict[Site, Sketch | Pending] = {}
        self._kept_for: int | None = None
        self._is_end_awaited = False
        self._last: _Remembered | None = None
        self._before: _Remembered | None = None
        self.encoder_layers = self._selector.encoder_layers
        self.look()

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is watched; a module with several outputs stands for each of them once it has run."""
        return tuple(site for base in self._selector.sites() for site in self._outputs.get(base, (base,)))

    def watched_modules(self) -> list[str]:
        """Names of the modules whose activations are selected."""
        return list(self._selector.module_names) if "activations" in self._kinds else []

    def wants_kind(self, kind: str) -> bool:
        """Whether anything of this kind is watched."""
        return kind in self._kinds

    def wants(self, site: Site) -> bool:
        """Whether this site is watched."""
        if self._faults != self._notices.faults:
            self._faults = self._notices.faults
            self._wanted_sites.clear()
        known = self._wanted_sites.get(site)
        if known is None:
            known = site.kind in self._kinds and self._patterns.match(site.name) and not self._notices.is_broken(site)
            self._wanted_sites[site] = known
        return known

    def look(self, for_modules: bool = False) -> None:
        """Look at the model as it is now, and select; for its modules alone where parameters are read later."""
        self._selector.look()
        model = self._model()
        if not for_modules:
            self.parameters.select(self._selector.parameters)
        if self._selector.is_new and model is not None:
            self.units.select(self._selector.modules(), self._selector.last_layer)
            if self.shards is not None:
                self.shards.select(model, self._selector.parameters)

    def selected(self) -> Iterator[ModuleEntry]:
        """The modules that were selected when the model was last looked at."""
        return self._selector.modules()

    def modules(self) -> Iterator[ModuleEntry]:
        """The selected modules, as the model is now."""
        if MODULE_KINDS.intersection(self._kinds):
            self.look(for_modules=True)
            yield from self._selector.modules()

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

    def take(self, site: Site, tensor: torch.Tensor, taken: list[Any]) -> None:
        """Measure a tensor as it is now, at once or later, where that can be done.

        Args:
            site: Its site.
            tensor: The tensor.
            taken: What came of it is added here, as for `add_measured`.
        """
        try:
            if self.shards is not None:
                tensor = self.shards.own(site, tensor)
            known = self._known(tensor)  # a container returns what its last child returned
            found, place = known[2:] if known is not None else self._measure(tensor)
        except Exception as error:
            self._cannot(site, error)
            return
        self.buffer.note(site, tensor)
        if "[" in site.name:
            self._outputs.setdefault(Site(site.kind, site.name.partition("[")[0]), {})[site] = None
        taken += (site, found, place)

    def _cannot(self, site: Site, error: Exception) -> None:
        """Tell why a tensor was not measured."""
        if isinstance(error, CapturingError):
            self._notices.say(str(error))
        elif isinstance(error, UnmeasurableError):
            self._notices.say(f"{place_of(site)} are not measured: {error}")
        else:
            self._notices.failed(place_of(site), error)

    def _measure(self, tensor: torch.Tensor) -> tuple[Sketch | Pending | ArrivingGroup, int]:
        """Measure a tensor, and remember it."""
        found, place = self._batch.put(tensor)
        if type(tensor) is torch.Tensor and not tensor.is_inference():  # parameters must not be referred to weakly
            version = version_of(tensor)
            if version is not None:
                self._last, self._before = (weakref.ref(tensor), version, found, place), self._last
        return found, place

    def _known(self, tensor: torch.Tensor) -> _Remembered | None:
        """What was measured of a tensor, where it is one of the last two and was not changed since."""
        found = self._last
        if found is None or found[0]() is not tensor:
            found = self._before
            if found is None or found[0]() is not tensor:
                return None
        return found if found[1] == version_of(tensor) else None

    def _copied(self, tensor: torch.Tensor) -> tuple[ArrivingGroup, int] | None:
        """The group that a tensor is measured with later, and its place there; None for any other tensor."""
        known = self._known(tensor)
        return (known[2], known[3]) if known is not None and isinstance(known[2], ArrivingGroup) else None

    def is_counted(self, site: Site) -> bool | None:
        """Whether what this rank measures at a site belongs into a sum over ranks; None where it cannot tell."""
        return self.shards.is_counted(site) if self.shards is not None else True

    def tell_of_limits(self) -> None:
        """Say where what is recorded is one part of several, and where a hook costs a fast path."""
        tell_of_limits(self._notices, self._model(), self.shards, self._place, self._ranks)

    def open(self, step: int) -> None:
        """Begin the record of a step, or go on with it."""
        if self.buffer.step is None:
            self.look()  # once more: modules may have been replaced since the forward pass
            self._samples = 0
        self.buffer.open(step)

    def close(self) -> StepRecord | None:
        """End the record, with the parameters that no optimizer has moved; None where there is nothing new."""
        self.add(self.parameters.lacking(self.buffer.sites))
        for name, tally in self.units.silent(self.buffer.units()):
            self.buffer.add_units(name, tally)
        self._batch.cut()
        return self.buffer.close()

    def add(self, tensors: Iterable[tuple[Site, torch.Tensor]], are_made_for_us: bool = False) -> None:
        """Measure tensors into the record; see `measure_later` for those that nobody else holds."""
        if self.sees_capturing():
            return
        sites: list[Site] = []
        column = Column()
        if are_made_for_us or self.shards is not None:
            wanted = self._wanted(tensors, sites, column)
            measure_later(wanted, self._sample_above, self._batch.devices, are_made_for_us, column)
        else:
            self._measure_all(tensors, sites, column)
        self._add_column(sites, column)

    def _add_column(self, sites: list[Site], column: Column) -> None:
        for place, error in column.failures():
            self._cannot(sites[place], error)
        self.buffer.add_column(sites, column)

    def _measure_all(self, tensors: Iterable[tuple[Site, torch.Tensor]], sites: list[Site], column: Column) -> None:
        """Measure the tensors that are watched, all of which somebody holds; their sites are added to those given."""
        found = list(tensors)
        if self._notices.faults or (found and found[0][0].kind not in self._kinds):
            kinds, is_broken = self._kinds, self._notices.is_broken
            found = [pair for pair in found if pair[0].kind in kinds and not is_broken(pair[0])]
        sites += [site for site, _ in found]
        with Unseen():
            self.buffer.note_all(sites, wanted := [tensor for _, tensor in found])
        measure_later(wanted, self._sample_above, self._batch.devices, False, column)
        if found and found[0][0].kind == "gradients":
            self._add_rows(found, column, 0)

    def _add_rows(self, found: list[tuple[Site, torch.Tensor]], column: Column | None, first: int) -> None:
        try:
            self._rows.add(found, column, self._samples or 1, first)
        except Exception as error:  # which must not cost the sketches
            self._notices.failed("units by rows of gradients", error)

    def _wanted(
        self, tensors: Iterable[tuple[Site, torch.Tensor]], sites: list[Site], column: Column
    ) -> Iterator[torch.Tensor]:
        """Those watched, whose sites are added to those given; each is in the column when the next is asked for."""
        kinds, is_broken, note = self._kinds, self._notices.is_broken, self.buffer.note
        for site, tensor in tensors:
            if site.kind in kinds and not is_broken(site):
                note(site, tensor)
                own = tensor if self.shards is None else self.shards.own(site, tensor)
                sites.append(site)
                yield own
                if site.kind == "gradients":
                    self._add_rows([(site, tensor)], column if own is tensor else None, len(column) - 1)

    def judge(self, name: str, inputs: Any, output: Any, taken: list[Any]) -> None:
        """Tally the units of a module that has returned; see `UnitJudge.judge`.

        Args:
            name: Name of the module.
            inputs: Its positional arguments.
            output: What it returned.
            taken: What came of it is added here, as for `add_measured`.
        """
        if self._notices.faults and self._notices.is_broken(site_of("units", name)):
            return
        try:
            found = self.units.judge(name, inputs, output)
        except Exception as error:
            self._notices.failed(f"units of {name}", error)
            return
        if found is not None:
            taken += (site_of("units", found[0]), found[1], found[2])

    def add_gradients(self, pairs: Pairs, scale: torch.Tensor | None) -> None:
        """Measure the gradients of these parameters, which a fused optimizer will divide by a scale itself."""
        found = self.parameters.gradients(pairs) if scale is None else self.parameters.divided(pairs, scale)
        self.add(found, are_made_for_us=scale is not None)

    def remember(self, pairs: Pairs) -> None:
        """Before a step: keep parameters, to tell what it changes."""
        self._updates.remember(pairs, are_whole=self.shards is None and not self._notices.faults)

    def add_updates(self, pairs: Pairs) -> None:
        """Measure what a step has changed of these parameters."""
        found, alone = self._updates.together(pairs), self._updates.alone(pairs)
        if found is None or self.sees_capturing():
            self.add(alone, True)
            return
        sites, column = found
        self.buffer.note_all(sites, [_CHANGE] * len(sites))
        measure_later(self._wanted(alone, sites, column), self._sample_above, self._batch.devices, True, column)
        self._add_column(self._updates.in_order(pairs, sites, column), column)

    def add_missing(self, tensors: Iterable[tuple[Site, torch.Tensor]]) -> None:
        """Measure those tensors into the record that it lacks."""
        self.add((site, tensor) for site, tensor in tensors if site not in self.buffer.sites)

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
        return all(is_cleared(gradient) for gradient in gradients[:4])

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
                    self.buffer.note(site, tensor)
        except Exception as error:
            self._notices.failed("gradients", error)

    def add_what_is_there(self, step: int) -> None:
        """Gradients and parameters, where no optimizer says which are its own.

        A gradient that is zero was cleared after its use: what the last backward pass of the step left counts instead,
        and where that is not known it is absent.
        """
        pairs = self.parameters.of()
        self.add_missing(pair for pair in self.parameters.gradients(pairs) if not is_cleared(pair[1]))
        for site, sketch in self._kept.items() if self._kept_for == step else ():
            if site not in self.buffer.sites:
                self.buffer.add(site, sketch)
        self._kept.clear()
        self._is_end_awaited = False
        self.add_missing(self.parameters.values(pairs))

    def add_measured(self, taken: Iterable[Any], scale: torch.Tensor | None) -> None:
        """Add what hooks have measured.

        Args:
            taken: Three entries for each: its site; the sketch, or tally of units, or what will give one, or number of
                samples of a pass, or None for what could not be measured inside of a graph; and `ALONE`. Or a group
                instead, and the place or number there.
            scale: What a gradient scaler has multiplied gradients by, of shape ().
        """
        divisor: float | LateNumber | None = None
        entries = iter(taken)
        for site, item, place in zip(entries, entries, entries, strict=True):
            if site.kind == "units":
                if isinstance(item, int):
                    self._samples += item
                else:
                    self.buffer.add_units(site.name, item, place)
                continue
            if item is None:
                self._notices.say(f"{place_of(site)} could not be measured inside the graph")
                continue
            if scale is not None and site.kind == "activation_gradients":
                divisor = divisor or (float(scale) if edge_for(scale.device) is None else LateNumber(scale))
                self.buffer.divide(site, divisor)
                self.buffer.add(site, Divided(item if place == ALONE else item.item(place), divisor))
                continue
            self.buffer.add(site, item, place)
