"""What needs an extra says so."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "packages"),
    [("transformers", ["transformers"]), ("lightning", ["lightning.pytorch", "pytorch_lightning"])],
)
def test_a_callback_without_its_trainer_names_the_extra(
    name: str, packages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trainer is not installed, importing its callback says what to install."""
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"instrument.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=r'pip install "torch-instrument\[integrations\]"'):
        importlib.import_module(f"instrument.integrations.{name}")
