"""Real trainers: collected only where they are installed (`make test-integrations`), with nothing downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TRAINERS = ("transformers", "lightning", "accelerate", "peft")
collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in TRAINERS) else ["test_*.py"]

if not collect_ignore_glob:
    with warnings.catch_warnings():  # what they warn of while they are imported is theirs
        warnings.simplefilter("ignore")
        for name in ("transformers", "lightning.pytorch", "accelerate", "peft"):
            importlib.import_module(name)
    torch.set_num_threads(1)  # models this small only wait for a second thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trainers warn of their own deprecations; ours stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error::instrument.InstrumentWarning"))
