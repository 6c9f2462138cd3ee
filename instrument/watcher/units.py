"""Which tensor tells what a module's units do, and which of its dimensions the units are.

| module | judged |
| --- | --- |
| a nonlinearity of `instrument.measure.slopes` | its input, by its slope |
| the same run in place or called by keyword | its output, by its slope where that tells, else the range |
| a module named in `functions` | its output, by the slope of the function that follows |
| weight of a linear layer or convolution behind which no nonlinearity was seen | rows of its gradient that are zero |
| any other module without children | the range of its output |
| the last layer and what follows it, embeddings, norms, dropout, pooling, softmax, losses, containers | nothing |

A nonlinearity takes the layout of the layer that ran last before it: after a convolution dimension 1 is the channel,
after a linear layer the last dimension is the feature. Where one module serves several layers (the one `relu` of a
residual block), each layer's units are apart: ``relu`` for the first and ``relu[conv2]`` for the others.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from instrument.capture.names import PARAMETRIZATIONS, ModuleEntry, Site, is_leaf, site_of, unwrapped
from instrument.capture.outputs import named_tensors
from instrument.capture.patterns import Pattern
from instrument.errors import UnmeasurableError
from instrument.measure import native
from instrument.measure.device import Devices
from instrument.measure.groups import ArrivingGroup, Group
from instrument.measure.pending import ALONE
from instrument.measure.slopes import Slopes, slopes_named, slopes_of
from instrument.measure.tensors import whole
from instrument.measure.units import Extent, UnitTally, extent_of, tally_plain, tally_rows
from instrument.record.tallies import Tally
from instrument.torch_private import Unseen, can_hide, children_of, parameters_of, version_of

__all__ = ["UnitJudge"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EXEMPT = (
    nn.Embedding, nn.EmbeddingBag, nn.Identity, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax
)  # fmt: skip
_EXEMPT_HOMES = frozenset(
    f"torch.nn.modules.{home}"
    for home in (
        "batchnorm", "instancenorm", "normalization", "dropout", "pooling", "padding", "flatten", "upsampling",
        "pixelshuffle", "channelshuffle", "fold", "loss", "distance",
    )
)  # fmt: skip
"""Modules of torch whose units are those of the layer before them, or are none."""


@dataclasses.dataclass(frozen=True)
class _Role:
    """What is judged of one module."""

    module: weakref.ref[nn.Module]
    slopes: Slopes | None = None
    """Where the module, or the function behind it, is flat."""

    is_nonlinearity: bool = False
    """Whether the module itself is the nonlinearity, so that its input is z."""

    is_layer: bool = False
    """Whether the module has parameters, and so says what the dimensions of its output are."""

    is_exempt: bool = False
    positions: int = 0
    """Dimensions behind that of the units."""

    weight_axis: int | None = None
    """Dimension of the units in the module's weight; None where its rows tell nothing."""


class UnitJudge:
    """Tallies the units of the modules of one model.

    Args:
        functions: Glob over module names to the name of the function that follows.
        wants: Whether a site is watched.
        say: Told once what cannot be judged, and why.
        copied: Gives the group that a tensor is measured with later, and its place: its units are tallied then.
        devices: What tallies of tensors on other devices travel to the host with.
    """

    def __init__(
        self,
        functions: Mapping[str, str],
        wants: Callable[[Site], bool],
        say: Callable[[str], None],
        copied: Callable[[torch.Tensor], tuple[ArrivingGroup, int] | None] = lambda tensor: None,
        devices: Devices | None = None,
    ) -> None:
        self._functions = [(Pattern(glob), slopes_named(function)) for glob, function in functions.items()]
        self._wants = wants
        self._say = say
        self._copied = copied
        self._devices = devices
        self._roles: dict[str, _Role] = {}
        self._nonlinearities: list[tuple[str, Slopes]] = []
        self._with_rows: dict[str, str] = {}
        self._selections = 0
        self._root: str | None = None
        self._last_layer: str | None = None
        self._keys: dict[str, dict[str, str]] = {}
        self._judged: set[str] = set()
        self._seen: set[str] = set()
        self._layer: tuple[str, int] | None = None
        self._known: tuple[weakref.ref[torch.Tensor], int | None, int, Extent] | None = None

    def select(self, modules: Iterable[ModuleEntry], last_layer: str | None) -> None:
        """Look at the selected modules as they are now.

        Args:
            modules: The modules.
            last_layer: Name of the layer that makes the model's output.
        """
        self._last_layer = last_layer
        self._selections += 1
        roles = {}
        for entry in modules:
            if entry.is_root:
                self._root = entry.name
            role = self._roles.get(entry.name)
            roles[entry.name] = role if role is not None and role.module() is entry.module else self._role(entry)
        self._roles = roles
        self._nonlinearities = [
            (name, role.slopes) for name, role in roles.items() if role.is_nonlinearity and role.slopes is not None
        ]
        self._with_rows = {f"{name}.weight": name for name, role in roles.items() if role.weight_axis is not None}

    def pass_starts(self) -> None:
        """The root is called: no layer has run yet."""
        self._layer = None

    def judge(self, name: str, inputs: Any, output: Any) -> tuple[str, Tally | Group | int, int] | None:
        """Tally the units of a module that has just returned.

        Args:
            name: Name of the module.
            inputs: Its positional arguments, as the call has left them.
            output: What it returned.

        Returns:
            Name to record it under, and the tally; of the model itself, how many samples the pass was of, as far as
            its first output tells; and `ALONE`. Or the group that will make the tally, and its number there. None where
            nothing is judged or can be.
        """
        role = self._roles.get(name)
        if role is None or (role.is_exempt and name != self._root):
            return None
        path, tensor = ("", output) if type(output) is torch.Tensor else next(named_tensors(output), ("", None))
        if tensor is None or not tensor.dim():
            return None
        if role.is_exempt:
            return name, len(tensor), ALONE
        if not self._wants(site_of("activations", name + path)):
            return None
        before, slopes = self._layer, role.slopes
        if role.is_layer:
            self._layer = before = name, role.positions
        if slopes is None and name == self._last_layer:
            return None
        if role.is_nonlinearity:
            if before is not None and before[0] == self._last_layer:
                self._seen.add(name)
                return None
            tensor, slopes = self._input(name, role, inputs, tensor)
        if slopes is not None and before is not None:
            self._judged.add(before[0])
        axis = max(0, tensor.dim() - 1 - role.positions) if role.is_layer else _axis(tensor, before)
        tally = self._tally(tensor, axis, slopes)
        if tally is None:
            return None
        return (name if role.is_layer or before is None else self._key(name, before[0])) + path, *tally

    @property
    def age(self) -> tuple[int, int]:
        """What is another whenever `module_of_rows` may answer otherwise, unless a site is wanted no more."""
        return self._selections, len(self._judged)

    def module_of_rows(self, parameter: str) -> str | None:
        """Name of the module of whose units rows of a parameter's gradient tell, where nothing else tells of them.

        None where the rows tell nothing, or a nonlinearity was seen behind the layer.
        """
        name = self._with_rows.get(parameter)
        if name is None or name in self._judged or name == self._last_layer:
            return None
        return name if self._wants(site_of("activations", name)) else None

    def are_rows_first(self, name: str) -> bool:
        """Whether the units of a module are the first dimension of its weight."""
        return self._roles[name].weight_axis == 0

    def rows(self, parameter: str, gradient: torch.Tensor, samples: int) -> Tally | None:
        """Tally the rows of a gradient that are zero.

        Args:
            parameter: Name of a parameter that `module_of_rows` knows.
            gradient: Its gradient, as the optimizer will use it.
            samples: Samples that the gradient is of, at least 1.

        Returns:
            The tally; None where the gradient cannot be read.
        """
        axis = self._roles[self._with_rows[parameter]].weight_axis
        assert axis is not None
        if not can_hide():
            return None
        try:
            with Unseen():
                return tally_rows(gradient, axis, samples)
        except UnmeasurableError:
            return None

    def silent(self, seen: Iterable[str]) -> Iterator[tuple[str, UnitTally]]:
        """Nonlinearities of which nothing was ever seen: no data is not the same as dead.

        Args:
            seen: Names under which something was recorded in this step.

        Yields:
            Name, and a tally of no unit and no sample.
        """
        self._seen.update(seen)
        for name, slopes in self._nonlinearities:
            if name not in self._seen and name not in self._keys:
                yield name, UnitTally.empty(0, slopes.function)

    def _input(self, name: str, role: _Role, inputs: Any, output: torch.Tensor) -> tuple[torch.Tensor, Slopes | None]:
        """What tells the slope of a nonlinearity: its input, or its output where the input is gone."""
        assert role.slopes is not None
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0] is not output:
            return inputs[0], role.slopes
        slopes = role.slopes.by_output()
        if slopes is None:
            self._say(
                f"{name}: {role.slopes.function} runs in place or is called by keyword, so its input is gone and its "
                "output does not tell the slope: of its units only the range is judged"
            )
        return output, slopes

    def _tally(self, tensor: torch.Tensor, axis: int, slopes: Slopes | None) -> tuple[Tally | Group, int] | None:
        """Tally a tensor, with the ranges found before if it was the last one looked at; None where it cannot be."""
        copied = self._copied(tensor)
        if copied is not None:
            group, place = copied
            number = group.tally(place, tuple(tensor.shape), axis, slopes)
            if number is not None:
                return group, number
        if not can_hide():  # a mode of the user's would see our operations
            return None
        try:
            with Unseen():
                plain = tensor if native.can_read(tensor) else whole(tensor)
                if not plain.is_cpu or not plain.numel():
                    return tally_plain(plain, axis, slopes, None, self._devices), ALONE
                known = self._known
                if known is not None and known[0]() is tensor and known[1:3] == (version_of(tensor), axis):
                    return tally_plain(plain, axis, slopes, known[3]), ALONE
                extent = extent_of(plain, axis)
                if type(tensor) is torch.Tensor and not tensor.is_inference():
                    self._known = weakref.ref(tensor), version_of(tensor), axis, extent
                return tally_plain(plain, axis, slopes, extent), ALONE
        except UnmeasurableError:
            return None

    def _key(self, name: str, layer: str) -> str:
        """Name for what a module does behind one layer: its own behind the first, with the layer's behind others."""
        keys = self._keys.setdefault(name, {})
        return keys.setdefault(layer, f"{name}[{layer}]" if keys else name)

    def _role(self, entry: ModuleEntry) -> _Role:
        """What is judged of a module."""
        module = unwrapped(entry.module)
        reference = weakref.ref(entry.module)
        named = next((slopes for pattern, slopes in self._functions if pattern.matches(entry.name)), None)
        if not is_leaf(module) or f".{PARAMETRIZATIONS}." in f".{entry.name}.":
            return _Role(reference, is_exempt=True)
        slopes = slopes_of(module)
        if slopes is not None:
            return _Role(reference, slopes, is_nonlinearity=True)
        homes = {base.__module__ for base in type(module).__mro__}
        is_norm = "norm" in type(module).__name__.lower()
        is_exempt = is_norm or isinstance(module, _EXEMPT) or not homes.isdisjoint(_EXEMPT_HOMES)
        has_parameters = bool(children_of(module) or any(p is not None for p in parameters_of(module).values()))
        positions, axis = 0, None
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
            positions = len(module.kernel_size)
            axis = 0 if isinstance(module, _CONVOLUTIONS) else 1 if module.groups == 1 else None
        elif isinstance(module, nn.Linear):
            axis = 0
        return _Role(
            reference,
            named,
            is_layer=has_parameters and not is_norm,
            is_exempt=is_exempt and named is None,
            positions=positions,
            weight_axis=axis,
        )


def _axis(tensor: torch.Tensor, layer: tuple[str, int] | None) -> int:
    """Dimension of the units of what is no layer: as the layer that ran last has it."""
    dimensions = tensor.dim()
    if layer is None:  # no layer is watched: images have four dimensions, sequences three
        return 1 if dimensions >= 4 else dimensions - 1
    return 1 if dimensions == layer[1] + 2 else dimensions - 1
