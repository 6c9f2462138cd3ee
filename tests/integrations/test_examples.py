"""The documented examples of modules that need a trainer run."""

from __future__ import annotations

import doctest
import importlib

import pytest

from ..test_house import NEED_TRAINERS


@pytest.mark.parametrize("name", sorted(NEED_TRAINERS))
def test_documented_examples_run(name: str) -> None:
    """Examples in docstrings do what they say."""
    result = doctest.testmod(importlib.import_module(name))
    assert (result.failed, result.attempted) == (0, 1)
