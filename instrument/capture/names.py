"""Names: which modules and parameters a set of globs selects, and what lies near a glob that selects none."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from instrument.capture.patterns import Pattern, Patterns
from instrument.errors import SelectionError
from instrument.torch_private import children_of, is_compiled, parameters_of

__all__ = [
    "ModuleEntry",
    "ParameterEntry",
    "Selection",
    "Site",
    "check_functions",
    "check_selection",
    "has_forward",
    "is_leaf",
    "named_modules",
    "named_parameters",
    "nearest_names",
    "select",
    "site_of",
    "unwrapped",
]

WRAPPER_PARTS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Levels of a name that wrappers add: DDP and DataParallel, compile, FSDP1, activation checkpointing."""

PARAMETRIZATIONS = "parametrizations"
"""Name of the child under which `torch.nn.utils.parametrize` keeps what works out a module's parameters."""

MODULE_KINDS = frozenset({"activations", "activation_gradients"})
PARAMETER_KINDS = frozenset({"parameters", "gradients", "updates"})
_NEAREST = 3


class Site(NamedTuple):
    """One (kind, name) that is watched."""

    kind: str
    """One of `instrument.config.KINDS`."""

    name: str
    """Module or parameter name without wrapper parts; one of several outputs as ``name[0]``."""


site_of = functools.lru_cache(maxsize=65_536)(Site)
"""The site of a kind and a name: the same come again each step, and made anew would keep the garbage collector busy."""


class ModuleEntry(NamedTuple):
    """A module under the name it is shown by."""

    name: str
    module: nn.Module
    is_root: bool
    is_inside_compiled: bool = False
    """Whether a module above this one is compiled, so that calls of this one are part of a graph."""


@dataclasses.dataclass(frozen=True)
class ParameterEntry:
    """A parameter, found again through the module that has it.

    A weak reference to the parameter itself would make ``module.to()`` fail for tensor subclasses, and a strong
    one would outlive a replacement.
    """

    name: str
    owner: weakref.ref[nn.Module]
    attribute: str

    def get(self) -> nn.Parameter | None:
        """The parameter as it is now; reading the attribute of the module instead may compute."""
        owner = self.owner()
        return parameters_of(owner).get(self.attribute) if owner is not None else None


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a set of globs selects in a model."""

    modules: tuple[ModuleEntry, ...]
    parameters: tuple[ParameterEntry, ...]
    aliases: dict[str, str]
    """Further name of a tied parameter or shared module, to the name under which it is recorded."""

    last_layer: str | None = None
    """Name of the module that gives the model's output, as far as the order of registration tells: the last one that
    has parameters and no children, selected or not."""

    def names(self) -> list[str]:
        """Every name that leads to something selected, further names included."""
        modules = [entry.name for entry in self.modules]
        return modules + [entry.name for entry in self.parameters] + list(self.aliases)


def named_modules(model: nn.Module) -> list[ModuleEntry]:
    """Every module under each of its names, without wrapper parts; the root by the class of what is wrapped.

    A level counts as a wrapper's where it has a wrapper's name and its owner has no other child, so that a
    model with a child called ``module`` beside others keeps it. Of a wrapper and what it wraps, which share a
    name, the outermost stands: it is the one that is called.

    Args:
        model: Any module; only its dictionaries of children are read.

    Returns:
        One entry a name, parents before children.

    Example:
        >>> [entry.name for entry in named_modules(nn.Sequential(nn.ReLU()))]
        ['Sequential', '0']
    """
    found: dict[str, tuple[nn.Module, bool]] = {}
    root = model
    for name, module, is_inside in _walk(model, "", ()):
        if not name:
            root = module
        found.setdefault(name, (module, is_inside))
    root_name = _class_name(root)
    if root_name in found:
        root_name = f"({root_name})"
    return [ModuleEntry(name or root_name, module, not name, is_inside) for name, (module, is_inside) in found.items()]


def _class_name(module: nn.Module) -> str:
    """The name of a module's class as the user wrote it; `fully_shard` puts a class of its own before that."""
    kind = type(module)
    first, *others = kind.__bases__
    return others[0].__name__ if first.__name__ == "FSDPModule" and others else kind.__name__


def _walk(
    module: nn.Module, name: str, above: tuple[nn.Module, ...], is_inside: bool = False
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Names, modules and whether a compiled one is above, depth first; one that holds itself is not entered again."""
    yield name, module, is_inside
    children = children_of(module)
    is_inside = is_inside or is_compiled(module)
    for key, child in children:
        if child is module or any(child is parent for parent in above):
            continue
        wraps = len(children) == 1 and key in WRAPPER_PARTS
        child_name = name if wraps else f"{name}.{key}" if name else key
        yield from _walk(child, child_name, (*above, module), is_inside)


def named_parameters(modules: Iterable[ModuleEntry]) -> Iterator[tuple[ParameterEntry, nn.Parameter]]:
    """Every parameter under each of its names; the dictionaries are read, never the attributes."""
    for entry in modules:
        prefix = "" if entry.is_root else entry.name + "."
        for owner in _with_wrapped(entry.module):
            for attribute, parameter in parameters_of(owner).items():
                if parameter is not None:
                    yield ParameterEntry(prefix + attribute, weakref.ref(owner), attribute), parameter


def _with_wrapped(module: nn.Module) -> Iterator[nn.Module]:
    """A module and, where it is a wrapper, what it wraps: the parameters are there, under the same name."""
    yield module
    while len(children := children_of(module)) == 1:
        ((key, child),) = children
        if key not in WRAPPER_PARTS or child is module:
            return
        yield child
        module = child


def select(model: nn.Module, patterns: Patterns, kinds: Iterable[str]) -> Selection:
    """Find what the patterns select in the model as it is now.

    Tied parameters and shared modules are found under each of their names and taken once, under the first name
    that matches. Containers without a forward of their own (`ModuleList`) are never called and so never
    selected.

    Args:
        model: Any module; nothing on it is read that computes.
        patterns: Includes and excludes.
        kinds: What is watched; modules are selected only for the kinds of activations, parameters only for the
            others.

    Returns:
        The selection, parents before children; it may be empty.

    Example:
        >>> [p.name for p in select(nn.Linear(2, 1), Patterns(["**"]), ["parameters"]).parameters]
        ['weight', 'bias']
    """
    wanted = frozenset(kinds)
    entries = named_modules(model)
    aliases: dict[str, str] = {}
    modules = []
    if wanted & MODULE_KINDS:
        taken: dict[int, str] = {}
        for entry in entries:
            if has_forward(entry.module) and patterns.may_match_output_of(entry.name):
                if id(entry.module) in taken:
                    aliases[entry.name] = taken[id(entry.module)]
                else:
                    taken[id(entry.module)] = entry.name
                    modules.append(entry)
    parameters = []
    if wanted & PARAMETER_KINDS:
        taken = {}
        for place, parameter in named_parameters(entries):
            if patterns.match(place.name):
                if id(parameter) in taken:
                    aliases[place.name] = taken[id(parameter)]
                else:
                    taken[id(parameter)] = place.name
                    parameters.append(place)
    last_layer = next((entry.name for entry in reversed(entries) if _is_layer(entry.module)), None)
    return Selection(tuple(modules), tuple(parameters), aliases, last_layer)


def unwrapped(module: nn.Module) -> nn.Module:
    """What a module wraps, where it is a wrapper, else the module itself.

    Example:
        >>> unwrapped(nn.ReLU())
        ReLU()
    """
    *_, innermost = _with_wrapped(module)
    return innermost


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children, but for those that work out its parameters.

    Example:
        >>> is_leaf(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))
        True
    """
    return all(name == PARAMETRIZATIONS for name, _ in children_of(module))


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has no children, and parameters of its own or parametrized ones."""
    module = unwrapped(module)
    return is_leaf(module) and bool(children_of(module) or any(p is not None for p in parameters_of(module).values()))


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called at all; `ModuleList` cannot, a compiled module has its forward on itself."""
    # Not by vars(): CPython makes a dictionary for that, and every later call of a module without one is slower.
    return getattr(getattr(module, "forward", None), "__func__", None) is not nn.Module.forward


def check_selection(model: nn.Module, patterns: Patterns, kinds: tuple[str, ...]) -> tuple[Selection, list[str]]:
    """Select, and refuse what cannot be meant: a glob without a match, a selection left empty.

    Args:
        model: The model that is to be watched.
        patterns: Includes and excludes.
        kinds: The kinds to watch.

    Returns:
        The selection, and sentences about globs that do nothing but harm nobody.

    Raises:
        SelectionError: An include that matches no name, with the nearest names; or nothing left.

    Example:
        >>> check_selection(nn.Linear(2, 1), Patterns(["weight"], ["head"]), ("parameters",))[1]
        ["exclude='head' matches no name and does nothing; the model has 'Linear', 'weight', 'bias'"]
    """
    entries = named_modules(model)
    names = [entry.name for entry in entries] + [place.name for place, _ in named_parameters(entries)]
    for pattern in patterns.include:
        if not any(pattern.may_match_output_of(name) for name in names):
            raise SelectionError(f"include={pattern.text!r} matches no name{nearest_names(pattern.body, names)}")
    selection = select(model, patterns, kinds)
    if not selection.modules and not selection.parameters:
        raise SelectionError(_empty_message(entries, patterns, kinds))
    notes = [
        f"exclude={pattern.text!r} matches no name and does nothing{nearest_names(pattern.body, names)}"
        for pattern in patterns.exclude
        if not any(pattern.may_match_output_of(name) for name in names)
    ]
    selected = selection.names()
    notes += [
        f"include={pattern.text!r} matches names, but none is left to watch: kinds or an exclude rule them out"
        for pattern in patterns.include
        if not any(pattern.may_match_output_of(name) for name in selected)
    ]
    return selection, notes


def check_functions(model: nn.Module, patterns: Iterable[str]) -> None:
    """Refuse a glob of `functions` that matches no module.

    Args:
        model: The model that is to be watched.
        patterns: The globs, over names of modules.

    Raises:
        SelectionError: A glob that matches no name, with the nearest names.

    Example:
        >>> check_functions(nn.Sequential(nn.Linear(2, 1)), ["0"])
    """
    names = [entry.name for entry in named_modules(model)]
    for text in patterns:
        pattern = Pattern(text)
        if not any(pattern.matches(name) for name in names):
            raise SelectionError(f"functions={text!r} matches no module{nearest_names(pattern.body, names)}")


def _empty_message(entries: list[ModuleEntry], patterns: Patterns, kinds: tuple[str, ...]) -> str:
    include = ", ".join(repr(pattern.text) for pattern in patterns.include) or "nothing"
    exclude = ", ".join(repr(pattern.text) for pattern in patterns.exclude) or "nothing"
    containers = [entry.name for entry in entries if not has_forward(entry.module) and patterns.match(entry.name)]
    reason = f"; {containers[0]!r} is a container, which is never called itself" if containers else ""
    return f"nothing is left to watch: include={include}, exclude={exclude}, kinds={', '.join(kinds)}{reason}"


def nearest_names(wanted: str, names: list[str]) -> str:
    """The names nearest to one that is none, as the end of a sentence.

    Args:
        wanted: What was given.
        names: What there is.

    Returns:
        Names that look alike or hold it; a few of all where none does.

    Example:
        >>> nearest_names("blcks.0", ["blocks.0", "head"])
        "; nearest: 'blocks.0'"
    """
    unique = list(dict.fromkeys(names))
    near = difflib.get_close_matches(wanted, unique, n=_NEAREST, cutoff=0.5)
    if not near:
        folded = wanted.casefold().strip("*.")
        near = [name for name in unique if folded and folded in name.casefold()][:_NEAREST]
    if near:
        return "; nearest: " + ", ".join(repr(name) for name in near)
    shown = ", ".join(repr(name) for name in unique[: 2 * _NEAREST])
    return f"; the model has {shown}{', ...' if len(unique) > 2 * _NEAREST else ''}"
