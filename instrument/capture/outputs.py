"""The tensors in what a module returns, each under a stable name.

Modules return tuples, lists, dictionaries and their subclasses (`ModelOutput` of transformers), named tuples,
dataclasses and packed sequences, one inside another. `torch.utils._pytree` knows only some of them and is
private, so this walker has one branch a kind; a new kind of output is one more branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

__all__ = ["MAX_DEPTH", "named_tensors"]

MAX_DEPTH = 5
"""Levels of nesting that are followed; deeper tensors are passed over."""


def named_tensors(output: Any, depth: int = MAX_DEPTH) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a module's output with its path: ``""`` for a lone tensor, else ``[0]``, ``[logits]`` ...

    A packed sequence counts as one tensor, its data. None, numbers and objects of other kinds are passed over.

    Args:
        output: What the module returned; nothing in it is changed.
        depth: How many levels may still be followed.

    Yields:
        Path and tensor, in the order in which they stand.

    Example:
        >>> [path for path, _ in named_tensors((torch.ones(1), {"logits": torch.ones(1), "loss": None}))]
        ['[0]', '[1][logits]']
    """
    if isinstance(output, torch.Tensor):
        yield "", output
        return
    if isinstance(output, PackedSequence):
        yield "", output.data
        return
    if depth == 0:
        return
    for key, value in _children(output):
        for path, tensor in named_tensors(value, depth - 1):
            yield f"[{key}]{path}", tensor


def _children(output: Any) -> Iterator[tuple[object, Any]]:
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=False)
    elif isinstance(output, (tuple, list)):
        yield from enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield field.name, getattr(output, field.name, None)
