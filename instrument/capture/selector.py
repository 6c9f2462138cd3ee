"""What is selected in a model, looked at anew each sampled step at the cost of a walk.

Modules and parameters come and go: a head is replaced, a layer frozen into another. To match every name again takes
20 us a module; to see that nothing has changed takes 2.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from instrument.capture.names import MODULE_KINDS, ModuleEntry, ParameterEntry, Site, has_forward, select
from instrument.capture.patterns import Patterns
from instrument.torch_private import children_of, is_compiled, parameters_of

__all__ = ["Selector"]

_Shape: TypeAlias = "list[Any]"


class Selector:
    """Gives what a set of globs selects in one model, as the model is now.

    Args:
        model: The model; only weak references to it and its modules are kept.
        patterns: Includes and excludes.
        kinds: What is watched.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1))
        >>> selector = Selector(model, Patterns(["**.bias"]), ["parameters"])
        >>> model.append(nn.Linear(1, 1)) and selector.look()
        >>> [place.name for place in selector.parameters]
        ['0.bias', '1.bias']
    """

    def __init__(self, model: nn.Module, patterns: Patterns, kinds: Iterable[str]) -> None:
        self._model = weakref.ref(model)
        self._patterns = patterns
        self._kinds = tuple(kinds)
        self._shape: _Shape = []
        self._walked: list[weakref.ref[nn.Module]] = []
        self._encoders: list[weakref.ref[nn.TransformerEncoderLayer]] = []
        self._modules: list[tuple[str, weakref.ref[nn.Module], bool, bool]] = []
        self.module_names: tuple[str, ...] = ()
        """Names of the modules selected last."""
        self.parameters: tuple[ParameterEntry, ...] = ()
        """The parameters selected last."""
        self.last_layer: str | None = None
        """Name of the layer that makes the model's output, where that can be told."""
        self.is_new = False
        """Whether the last look found something else than the one before."""

    def look(self) -> None:
        """Look at the model as it is now; where it is gone, the parameters selected last stand."""
        model = self._model()
        self.is_new = False
        if model is None:
            return
        walked, shape = _walk(model)
        # Numbers of objects are given out again: they tell modules apart only while all of them are alive.
        if shape != self._shape or any(module() is None for module in self._walked):
            selection = select(model, self._patterns, self._kinds)
            self._shape, self._walked = shape, [weakref.ref(module) for module in walked]
            self._encoders = [weakref.ref(part) for part in walked if isinstance(part, nn.TransformerEncoderLayer)]
            self._modules = [
                (m.name, weakref.ref(m.module), m.is_root, m.is_inside_compiled) for m in selection.modules
            ]
            self.module_names = tuple(module.name for module in selection.modules)
            self.parameters, self.last_layer, self.is_new = selection.parameters, selection.last_layer, True

    def sites(self) -> Iterator[Site]:
        """What is selected; a module stands for all its outputs."""
        for name in self.module_names:
            yield from (Site(kind, name) for kind in self._kinds if kind in MODULE_KINDS)
        for place in self.parameters:
            yield from (Site(kind, place.name) for kind in self._kinds if kind not in MODULE_KINDS)

    def encoder_layers(self) -> Iterator[nn.TransformerEncoderLayer]:
        """The transformer encoder layers of the model when it was last looked at, selected or not."""
        return (layer for reference in self._encoders if (layer := reference()) is not None)

    def modules(self) -> Iterator[ModuleEntry]:
        """The modules selected when the model was last looked at; none where it is gone."""
        if self._model() is None:
            return
        for name, ref, is_root, is_inside in self._modules:
            module = ref()
            if module is not None:
                yield ModuleEntry(name, module, is_root, is_inside)


_first, _second = operator.itemgetter(0), operator.itemgetter(1)


def _walk(model: nn.Module) -> tuple[list[nn.Module], _Shape]:
    """Every module once, and what a selection depends on: names and identities, and what makes a module callable."""
    found, seen = [model], {id(model)}
    shape: _Shape = []
    start = 0
    while start < len(found):  # a level at a time, by functions in C: a loop in Python takes twice as long
        level, start = found[start:], len(found)
        children, parameters = list(map(children_of, level)), list(map(parameters_of, level))
        every = list(itertools.chain.from_iterable(children))
        parts = list(map(_second, every))
        for of_each in (
            map(id, level), map(len, children), map(len, parameters), map(is_compiled, level), map(has_forward, level),
            map(_first, every), map(id, parts), itertools.chain.from_iterable(parameters),
            map(id, itertools.chain.from_iterable(map(dict.values, parameters))),
        ):  # fmt: skip
            shape += of_each
        for child in parts:
            if id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found, shape
