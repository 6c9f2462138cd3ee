"""The house: imports point one way, `__init__` is a table of contents, documented examples run, files stay small."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import instrument

PACKAGE = Path(instrument.__file__).parent

FLOORS = [
    {"errors", "config", "torch_private"},
    {"measure", "capture"},
    {"record"},
    {"diagnose", "launch"},
    {"by_hand", "watcher"},
    {"run"},
    {"integrations", "cli", "__init__"},
    {"__main__"},
]
"""Rooms from the ground up; a room may import from those below, never from beside or above."""

NEED_TRAINERS = {"instrument.integrations.lightning", "instrument.integrations.transformers"}

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND_ORDER = ["errors", "config", "torch_private"]


def modules() -> list[str]:
    # The object built of C is loaded by ctypes, and is no module though it looks like one.
    found = (module.name for module in pkgutil.walk_packages([str(PACKAGE)], "instrument."))
    return ["instrument", *(name for name in found if not name.endswith("._engine"))]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "instrument"}


def test_imports_point_one_way() -> None:
    """A room imports only from rooms below it; the ground floor from what stands before it."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            other = name.split(".")[1] if "." in name else "__init__"
            if other == room or room == "__init__":
                continue
            if room in GROUND_ORDER:
                assert GROUND_ORDER.index(other) < GROUND_ORDER.index(room), f"{path} imports {name}"
            else:
                assert FLOOR_OF[other] < FLOOR_OF[room], f"{path} imports {name}"


def test_exported_names_are_exactly_those_listed() -> None:
    """Every name in `__all__` exists, every public name is in it, and the contract's names are among them."""
    public = {
        name
        for name, value in vars(instrument).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public == set(instrument.__all__)
    assert instrument.__all__ == sorted(instrument.__all__, key=lambda name: (name.islower(), name))
    assert {
        "Config", "ConfigError", "InstrumentError", "InstrumentWarning", "SelectionError", "TensorBoardLogger",
        "get_histogram_interval", "launch_tensorboard", "measure", "unwatch", "watch",
    } <= public  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", modules())
def test_documented_examples_run(name: str) -> None:
    """Examples in docstrings do what they say, and every module says what shaped it."""
    if name.endswith("__main__") or name in NEED_TRAINERS:  # the latter run in tests/integrations
        return
    module = importlib.import_module(name)
    assert module.__doc__
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_importing_changes_nothing_and_does_not_start_dynamo() -> None:
    """Importing the library registers no hook, makes no file and does not import Dynamo, which takes seconds."""
    script = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import instrument; "
        "from torch.optim import optimizer; print(before == ('torch._dynamo' in sys.modules), "
        "len(optimizer._global_optimizer_pre_hooks), torch.is_grad_enabled())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "True 0 True\n"


def test_private_names_of_torch_are_touched_in_one_place() -> None:
    """No other file of the package names a private attribute of torch, its modules, tensors or optimizers."""
    things = (torch, torch.nn.Linear(1, 1), torch.ones(1), torch.nn.Parameter(), torch.optim.SGD([torch.ones(1)]))
    private = {name for thing in things for name in dir(thing) if name.startswith("_") and not name.endswith("__")}
    assert {"_C", "_modules", "_version", "_backward_hooks", "_optimizer_step_pre_hooks"} <= private
    for path in PACKAGE.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(part.startswith("_") for part in parts), f"{path} imports {parts}"
            if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self":
                raise AssertionError(f"{path}:{node.lineno} uses {ast.unparse(node)}")


def test_files_stay_small() -> None:
    """No file of the package is much over 350 lines; one that grows past it becomes a folder."""
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
