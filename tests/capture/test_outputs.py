"""Tensors in a module's output, each under a stable name."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from instrument.capture.outputs import MAX_DEPTH, named_tensors

T = torch.ones(1)


class Pair(NamedTuple):
    """A named tuple."""

    mean: torch.Tensor
    scale: torch.Tensor


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary as transformers returns it, which is a tuple by index too."""


@dataclasses.dataclass
class Result:
    """A dataclass with a tensor, None and a nested tuple."""

    logits: torch.Tensor
    loss: torch.Tensor | None
    states: tuple[torch.Tensor, ...]


class Opaque:
    """An object of the user's own."""

    tensor = T


CASES: list[tuple[str, Any, list[str]]] = [
    ("tensor", T, [""]),
    ("tuple", (T, T), ["[0]", "[1]"]),
    ("list with gaps", [None, T, 3, "x"], ["[1]"]),
    ("LSTM", (T, (T, T)), ["[0]", "[1][0]", "[1][1]"]),
    ("dict", {"logits": T, "loss": None}, ["[logits]"]),
    ("dict with numbers", {0: T, 2: T}, ["[0]", "[2]"]),
    ("dict subclass", ModelOutput(logits=T, past=(T,)), ["[logits]", "[past][0]"]),
    ("named tuple", Pair(T, T), ["[mean]", "[scale]"]),
    ("dataclass", Result(T, None, (T, T)), ["[logits]", "[states][0]", "[states][1]"]),
    ("packed sequence", pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), [""]),
    ("packed in tuple", (pack_sequence([torch.ones(2, 2)]), T), ["[0]", "[1]"]),
    ("nothing", None, []),
    ("object", Opaque(), []),
    ("class", Result, []),
    ("empty", (), []),
]


@pytest.mark.parametrize(("name", "output", "paths"), CASES, ids=[case[0] for case in CASES])
def test_each_tensor_has_its_path(name: str, output: Any, paths: list[str]) -> None:
    """Every kind of output yields its tensors under stable paths and passes over the rest."""
    assert [path for path, _ in named_tensors(output)] == paths


def test_a_packed_sequence_is_its_data() -> None:
    """Of a packed sequence the data is taken, not the sizes of its batches."""
    packed = pack_sequence([torch.full((3, 2), 7.0), torch.ones(1, 2)])
    ((_, tensor),) = named_tensors(packed)
    assert tensor is packed.data


def test_nesting_is_followed_to_a_limit() -> None:
    """Tensors deeper than the limit, and structures that hold themselves, are passed over."""
    deep: Any = T
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert [path for path, _ in named_tensors(deep)] == ["[0]" * MAX_DEPTH]
    assert list(named_tensors([deep])) == []
    endless: list[Any] = [T]
    endless.append(endless)
    assert len(list(named_tensors(endless))) == MAX_DEPTH
