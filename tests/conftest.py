"""What every test shares: fixed seeds, and no configuration or environment from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from instrument.measure.native import library
from instrument.watcher.watcher import watchers


@pytest.fixture(autouse=True)
def _clean_ground(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts in an empty directory, with a seed, and leaves torch's defaults as they were."""
    monkeypatch.delenv("INSTRUMENT_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    for watcher in list(watchers.values()):  # a test that failed may have left one
        watcher.close()
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module", params=["C", "NumPy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Measure in C, where the package was installed with a compiler, and in NumPy."""
    loaded = library.loaded
    if request.param == "C" and loaded is None:
        pytest.skip("the package was installed without a compiler")
    library.loaded = loaded if request.param == "C" else None
    yield request.param
    library.loaded = loaded
