"""Parameters, their gradients and what a step changes: read at the optimizer's own hooks, never kept.

`param.grad` in the optimizer's pre-hook is the one gradient that is right everywhere: after accumulation,
unscaling, clipping and all-reduce. Only the parameters that this optimizer owns are read there: a generator's
backward leaves gradients in the discriminator, which no one will ever apply.
"""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

from instrument.capture.names import ParameterEntry, Site, site_of
from instrument.torch_private import Unseen, are_bare, has_hooks, parameters_of

__all__ = ["UPDATE_SAMPLE", "Pairs", "Parameters", "is_cleared"]

_Dictionary: TypeAlias = "dict[str, torch.nn.Parameter | None]"

Pairs: TypeAlias = "list[tuple[str, torch.nn.Parameter]]"
"""Names and parameters."""

UPDATE_SAMPLE = 65_536
"""Elements of a parameter that are compared before and after a step. The root mean square of as many values of a
normal distribution has a standard error of 1 / sqrt(2 * 65536), 0.3 %; no second copy of the model is kept."""


class Parameters:
    """Reads the selected parameters of a model, optimizer by optimizer."""

    def __init__(self) -> None:
        self._selected: tuple[ParameterEntry, ...] = ()
        self._elsewhere: set[int] = set()
        self._owners: list[weakref.ref[torch.nn.Module]] = []
        self._kept: list[_Dictionary] = []
        """The dictionary of each owner, unless a parameter in that leads elsewhere."""
        self._names: list[str] = []
        """Name of each parameter."""
        self._numbers: list[int] = []
        """Number of the owner of each."""
        self._attributes: list[str] = []
        """Under which attribute the owner has each."""
        self._before: dict[str, torch.Tensor] = {}

    def select(self, entries: Iterable[ParameterEntry]) -> None:
        """Choose the parameters to read.

        They are kept so that the last step can be logged even when the model is gone by then; not those that
        lead back to their model by a hook or an attribute, since they would keep it alive for ever.
        """
        entries = tuple(entries)
        if entries is self._selected and not self._elsewhere and self._are_kept_as_they_are():
            return
        owners = {id(owner): owner for entry in entries if (owner := entry.owner()) is not None}
        elsewhere = {key for key, owner in owners.items() if _leads_elsewhere(owner)}
        if entries is not self._selected or elsewhere != self._elsewhere:
            self._selected, self._elsewhere = entries, elsewhere
            numbers = {key: number for number, key in enumerate(owners)}
            self._owners, self._kept = [weakref.ref(owner) for owner in owners.values()], [{} for _ in owners]
            found = [(entry, numbers[id(owner)]) for entry in entries if (owner := entry.owner()) is not None]
            self._names, self._numbers = [entry.name for entry, _ in found], [number for _, number in found]
            self._attributes = [entry.attribute for entry, _ in found]
        own = zip(self._dictionaries(), self._owners, strict=True)
        self._kept = [each if id(reference()) not in elsewhere else {} for each, reference in own]

    def _are_kept_as_they_are(self) -> bool:
        """Whether the dictionaries kept are those of the owners, and nothing hangs on any parameter in them."""
        found = self._dictionaries()
        if not all(map(operator.is_, found, self._kept)):
            return False
        every = itertools.chain.from_iterable(map(dict.values, found))
        return are_bare([parameter for parameter in every if parameter is not None])

    def _dictionaries(self) -> list[_Dictionary]:
        """Of each owner its parameters as they are now, or as they were when it went."""
        return [
            parameters_of(owner) if (owner := reference()) is not None else kept
            for reference, kept in zip(self._owners, self._kept, strict=True)
        ]

    def of(self, optimizer: torch.optim.Optimizer | None = None) -> Pairs:
        """Names and parameters that are selected and that this optimizer owns.

        Args:
            optimizer: Without one, all that are selected.

        Returns:
            Name and parameter, in the order of the model.
        """
        own = self._dictionaries()
        # Here and below `map` over functions in C: a loop in Python takes three times as long, 0.4 ms for 800.
        every = map(dict.get, map(own.__getitem__, self._numbers), self._attributes)
        found = [(name, p) for name, p in zip(self._names, every, strict=True) if p is not None]
        if optimizer is None:
            return found
        owned = set(map(id, itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)))
        return [pair for pair in found if id(pair[1]) in owned]

    def lacking(self, known: Container[Site]) -> list[tuple[Site, torch.Tensor]]:
        """Site and parameter of those selected that something lacks.

        Args:
            known: The sites that it has.
        """
        if all(map(known.__contains__, _sites("parameters", self._names))):
            return []
        return [(site, parameter) for site, parameter in self.values(self.of()) if site not in known]

    @staticmethod
    def gradients(parameters: Pairs) -> list[tuple[Site, torch.Tensor]]:
        """Site and gradient of parameters; a missing one is absent, never zero."""
        names, tensors = _apart(parameters)
        found = zip(_sites("gradients", names), map(_gradient, tensors), strict=True)
        return [(site, gradient) for site, gradient in found if gradient is not None]

    @classmethod
    def divided(cls, parameters: Pairs, scale: torch.Tensor) -> Iterator[tuple[Site, torch.Tensor]]:
        """The same of gradients that a fused optimizer will divide by a scale itself, of shape (); made one by one."""
        for site, gradient in cls.gradients(parameters):
            with Unseen():
                own = gradient / scale
            yield site, own

    @staticmethod
    def values(parameters: Pairs) -> list[tuple[Site, torch.Tensor]]:
        """Site and parameter of parameters."""
        names, tensors = _apart(parameters)
        return list(zip(_sites("parameters", names), tensors, strict=True))

    def remember(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Keep a sample of each parameter as it is before the step."""
        with Unseen():
            for name, parameter in parameters:
                self._before[name] = _sample(parameter).clone()

    def remember_as(self, name: str, values: torch.Tensor) -> None:
        """Keep values of shape (n,) as those that a parameter had before the step."""
        self._before[name] = values

    def forget(self, names: Iterable[str]) -> None:
        """Forget what was kept of parameters whose step never ended."""
        if self._before:
            for name in names:
                self._before.pop(name, None)

    def updates(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[Site, torch.Tensor]]:
        """What the step changed, of the same sample: up to `UPDATE_SAMPLE` elements, float64, of shape (n,)."""
        for name, parameter in parameters:
            before = self._before.pop(name, None)
            if before is not None:
                with Unseen():
                    after = _sample(parameter)
                    change = after.double() - before.double() if after.shape == before.shape else None
                if change is not None:
                    yield site_of("updates", name), change


def _apart(parameters: Pairs) -> tuple[Sequence[str], Sequence[torch.nn.Parameter]]:
    names, tensors = zip(*parameters, strict=True) if parameters else ((), ())
    return names, tensors


def _sites(kind: str, names: Iterable[str]) -> Iterator[Site]:
    return map(site_of, itertools.repeat(kind), names)


_gradient: Callable[[torch.Tensor], torch.Tensor | None] = operator.attrgetter("grad")


def is_cleared(gradient: torch.Tensor) -> bool:
    """Whether all of a gradient is zero; of kinds that cannot tell, or not without a wait for a device, it is not."""
    if not gradient.is_cpu:
        return False
    try:
        with Unseen():
            return gradient.numel() > 0 and not bool(gradient.count_nonzero())
    except Exception:
        return False


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Every n-th element in the order of memory, at most `UPDATE_SAMPLE` of them; a view wherever possible."""
    if hasattr(parameter, "to_local"):
        parameter = parameter.to_local()
    parameter = parameter.detach()
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    flat = parameter.permute(order).reshape(-1)
    step = math.ceil(flat.numel() / UPDATE_SAMPLE)
    # A step that divides a row would visit the same few columns in each row.
    while step > 1 and any(math.gcd(step, size) != 1 for size in parameter.shape):
        step += 1
    return flat[::step] if step > 1 else flat


def _leads_elsewhere(owner: torch.nn.Module) -> bool:
    """Whether objects of the user's hang on a parameter of this module: hooks, or attributes of any kind."""
    for parameter in parameters_of(owner).values():
        if parameter is not None:
            attributes = vars(parameter)
            if has_hooks(parameter) or (
                attributes and not all(isinstance(value, _PLAIN) for value in attributes.values())
            ):
                return True
    return False


_PLAIN = (bool, int, float, str, type(None))
