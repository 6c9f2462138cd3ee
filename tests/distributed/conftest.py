"""The pair of processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two ranks that stay for all tests: importing torch twice takes longer than most of them."""
    both = Pair()
    yield both
    both.close()
