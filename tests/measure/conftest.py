"""Both ways in which the CPU measures: in C, where the package was installed with a compiler, and in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instrument.measure import native


@pytest.fixture(scope="module", params=["C", "NumPy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Measure in this way for a while."""
    library = native._library
    if request.param == "C" and library is None:
        pytest.skip("the package was installed without a compiler")
    native._library = library if request.param == "C" else None
    yield request.param
    native._library = library
