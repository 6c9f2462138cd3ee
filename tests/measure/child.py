"""Programs that need a process of their own, such as one in which Triton interprets its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["answer"]

ROOT = Path(__file__).parents[2]


def answer(program: str, **settings: str) -> object:
    """What a program printed as JSON, run with these settings in its environment."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, **settings}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, env=environment, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)
