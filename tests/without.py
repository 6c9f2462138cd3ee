"""Runs tests in processes of their own, in which this library finds some private names of torch missing.

Nothing is taken away from torch itself, which needs those names too: only `_lookup`, by which the library finds
them, is told to miss them. One process imports torch once and forks for each test.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]


class Nursery:
    """Forks a child for each test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.without"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=PROJECT,
        )  # fmt: skip

    def check(self, function: Callable[[], None], missing: Iterable[str], directory: Path) -> None:
        """Call a function where those names are missing; it asserts for itself.

        Args:
            function: At the top of a module that imports this library inside of functions only.
            missing: Dotted names of torch, each of which must be looked up while the function runs.
            directory: Where it runs.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [function.__module__, function.__qualname__, sorted(missing), str(directory)]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        fault = json.loads(answer)
        assert fault is None, fault

    def close(self) -> None:
        """End the process that forks."""
        self._process.communicate()


def _load_shim(missing: list[str], asked: set[str]) -> None:
    """Import `instrument.torch_private` with names missing, before the rest of the library imports it."""
    path = PROJECT / "instrument" / "torch_private.py"
    tree = ast.parse(path.read_text())
    (after,) = (
        number
        for number, node in enumerate(tree.body, 1)
        if isinstance(node, ast.FunctionDef) and node.name == "_lookup"
    )
    tree.body[after:after] = ast.parse("_lookup = hiding(_lookup)").body

    def hiding(lookup: Callable[[str], Any]) -> Callable[[str], Any]:
        def found(name: str) -> Any:
            asked.add(name)
            return None if name in missing else lookup(name)

        return found

    shim = types.ModuleType("instrument.torch_private")
    shim.__dict__.update(hiding=hiding, __file__=str(path))
    sys.modules[shim.__name__] = shim
    exec(compile(tree, str(path), "exec"), shim.__dict__)


def _run(module: str, function: str, missing: list[str], directory: str) -> str | None:
    """In the child: what went wrong, or None."""
    os.chdir(directory)
    asked: set[str] = set()
    try:
        warnings.simplefilter("error")
        _load_shim(missing, asked)
        import instrument

        warnings.simplefilter("ignore", instrument.InstrumentWarning)
        # Dynamo itself reads .grad of what goes into a compiled block.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        getattr(importlib.import_module(module), function)()
        if not asked.issuperset(missing):
            return f"never looked up: {sorted(set(missing) - asked)}"
    except BaseException:
        return traceback.format_exc()
    return None


def _serve() -> None:
    """Fork for each line of the input."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "google_crc32c", "rich.console", "rich.table", "pytest"):
        importlib.import_module(name)  # what takes long and is not ours is imported once
    assert "instrument" not in sys.modules
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(_run(*json.loads(line))))
            os._exit(0)  # without what runs at exit, which belongs to the parent
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        print(answer or json.dumps(f"the child ended with status {status}"), flush=True)


if __name__ == "__main__":
    _serve()
