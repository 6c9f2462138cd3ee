"""Which part of a parameter or an output lies on this rank, under `torch.distributed`.

| tensor | on this rank |
| --- | --- |
| parameter of FSDP2, any DTensor | as its placements say: one shard of several, or one copy of several |
| parameter of FSDP1, flat or not | one shard, perhaps empty, perhaps with zeros for padding at its end |
| any other parameter | all of it: a copy, as under DDP, or the only one, as with experts or stages of a pipeline |
| any other output of a module | what this rank's batch gave |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from instrument.capture.names import MODULE_KINDS, ParameterEntry, Site
from instrument.torch_private import flat_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

__all__ = ["Part", "Shards"]

_PLAIN = (torch.Tensor, nn.Parameter)


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a tensor lies on this rank."""

    is_counted: bool | None
    """Whether the values here belong into a sum over the ranks: true for a shard, false for a copy of what another
    rank counts, None where only a look at the other ranks can tell."""

    is_shard: bool = False
    """Whether other ranks hold other values of the same tensor."""

    is_empty: bool = False
    """Whether no value of the tensor lies here."""

    padding: int = 0
    """Elements at the end that are no values."""


_OWN_BATCH = Part(True)
_WHOLE = Part(None)


class Shards:
    """Knows what of each watched tensor lies on this rank.

    Args:
        model: The model, as it is wrapped; only read while it is given.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, Part] = {}
        self._outputs: dict[str, Part] = {}

    def select(self, model: nn.Module, entries: Iterable[ParameterEntry]) -> None:
        """Look at the parameters as they are now."""
        flat = {key: Part(*facts) for key, facts in flat_parameters(model).items()}
        self._parameters = {
            entry.name: flat.get(id(parameter), _part_of(parameter, _WHOLE))
            for entry in entries
            if (parameter := entry.get()) is not None
        }

    def own(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """Note what a tensor is a part of; returns it without padding."""
        if site.kind in MODULE_KINDS:
            self._outputs[site.name] = _part_of(tensor, _OWN_BATCH)
            return tensor
        padding = self._part(site).padding
        if padding and site.kind != "updates":  # of updates a sample is measured, in which padding cannot be told
            return tensor.detach()[: tensor.numel() - padding]
        return tensor

    def is_counted(self, site: Site) -> bool | None:
        """As `Part.is_counted`, of a site."""
        return self._part(site).is_counted

    def _part(self, site: Site) -> Part:
        if site.kind in MODULE_KINDS:
            return self._outputs.get(site.name, _OWN_BATCH)
        return self._parameters.get(site.name, _WHOLE)

    def sharded(self) -> list[str]:
        """Names of the parameters of which other ranks hold other values."""
        return [name for name, part in self._parameters.items() if part.is_shard]

    def empty(self) -> list[str]:
        """Names of the parameters of which no value lies on this rank."""
        return [name for name, part in self._parameters.items() if part.is_empty]


def _part_of(tensor: torch.Tensor, plain: Part) -> Part:
    """The part that a tensor is, by its placements; those of plain tensors cannot be told from themselves."""
    if type(tensor) in _PLAIN or not (hasattr(tensor, "placements") and hasattr(tensor, "to_local")):
        return plain
    sharded: Any = tensor  # a DTensor, whose module is imported only where it is used
    mesh: DeviceMesh = sharded.device_mesh
    placements: tuple[Placement, ...] = sharded.placements
    place = mesh.get_coordinate()
    if place is None:  # this rank is not in the mesh
        return Part(False, is_shard=True, is_empty=True)
    is_first_copy = all(
        place[dimension] == 0 for dimension, placement in enumerate(placements) if placement.is_replicate()
    )
    is_shard = any(
        not placement.is_replicate() and mesh.size(dimension) > 1 for dimension, placement in enumerate(placements)
    )
    return Part(is_first_copy, is_shard, is_empty=sharded.to_local().numel() == 0)
