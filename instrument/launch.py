"""Starts TensorBoard: a subprocess on this machine alone, on the first free port, with run names people can read.

TensorBoard names a run by its path, `2026-02-10_001/logs/tensorboard`, and cuts that in its lists. It is therefore
given a temporary directory of links, one a run, which is kept up to date while it runs. A port is tried by binding
to it, since TensorBoard's own messages about busy ports differ by version; it is ready when `/data/environment`
answers with our directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from types import TracebackType

from instrument.config import ConfigSource, load_config
from instrument.errors import ConfigError, LaunchError, RunError
from instrument.record.runs import find_runs

__all__ = ["TensorBoardServer", "launch_tensorboard"]

HOST = "127.0.0.1"
READY_SECONDS = 90.0
STOP_SECONDS = 10.0
REFRESH_SECONDS = 5.0
SAMPLES = "histograms=300,images=50,text=50"
"""Points kept per tag. The fast loader keeps 100 histograms and 10 images by default, at random."""


class TensorBoardServer:
    """A running TensorBoard; stop it, or use it as a context manager.

    It is stopped too when it is collected and when the interpreter exits.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, links: _Links) -> None:
        self.port = port
        """TCP port on this machine."""
        self.url = f"http://{HOST}:{port}/"
        """Address to open in a browser."""
        self._process = process
        self._finalizer = weakref.finalize(self, _stop, process, links)

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Return when TensorBoard has ended, with its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """End TensorBoard and everything that it started; does nothing the second time."""
        self._finalizer()

    def __enter__(self) -> TensorBoardServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"TensorBoardServer({self.url if self.is_running else 'stopped'})"


def launch_tensorboard(
    runs: str | os.PathLike[str] | None = None, *, config: ConfigSource | None = None, port: int | None = None
) -> TensorBoardServer:
    """Start TensorBoard on runs, and return when it answers.

    Args:
        runs: A directory of runs or a single run; `runs_directory` of the configuration where not given.
        config: As in `instrument.load_config`; `default_port` and `max_port_attempts` are taken from it.
        port: First port to try, instead of `default_port`.

    Returns:
        The running server.

    Raises:
        RunError: The directory given does not exist.
        LaunchError: All ports are busy, or TensorBoard did not start; the message tells what it said.
        ConfigError: A configuration or port that cannot be used.

    Example:
        >>> with launch_tensorboard() as server:  # doctest: +SKIP
        ...     print(server.url)
        http://127.0.0.1:6006/
    """
    settings = load_config(config)
    root = Path(runs if runs is not None else settings.runs_directory)
    if runs is not None and not root.is_dir():
        raise RunError(f"there is no directory {root} to show")
    first = settings.default_port if port is None else port
    if isinstance(first, bool) or not isinstance(first, int) or not 0 < first < 65536:
        raise ConfigError(f"port: found {first!r}, allowed is a whole number from 1 to 65535")
    candidates = range(first, min(first + settings.max_port_attempts, 65536))
    for candidate in candidates:
        if _is_free(candidate):
            server = _start(root, candidate)
            if server is not None:
                return server
    tried = f"{candidates[0]}" if len(candidates) == 1 else f"{candidates[0]} to {candidates[-1]}"
    raise LaunchError(f"no port is free for TensorBoard: tried {tried}; free one, or give another default_port")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # a port whose last connection is just closing is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _start(root: Path, port: int) -> TensorBoardServer | None:
    """Start on one port; None where another process took it meanwhile."""
    links = _Links(root)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(links.directory), "--host", HOST]
    command += ["--port", str(port), "--reload_interval", "5", "--reload_multifile", "true"]
    command += ["--samples_per_plugin", SAMPLES, "--window_title", "instrument"]
    with links.log.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603  # our own
    try:
        is_ready = _wait_until_ready(process, port, links)
    except BaseException:
        _stop(process, links)
        raise
    if not is_ready:
        _stop(process, links)
        return None
    return TensorBoardServer(process, port, links)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, links: _Links) -> bool:
    """Return true when TensorBoard answers, false when another process has taken its port."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            if not _is_free(port):
                return False
            said = links.log.read_text(errors="replace").strip().splitlines()
            raise LaunchError(f"TensorBoard ended with code {process.returncode}: {said[-1] if said else 'silent'}")
        if _serves(port, links.directory):
            return True
        time.sleep(0.1)
    raise LaunchError(f"TensorBoard did not answer on port {port} within {READY_SECONDS:.0f} s")


def _serves(port: int, directory: Path) -> bool:
    """Whether a TensorBoard on this port shows this directory."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/data/environment", timeout=5) as answer:
            return str(json.load(answer).get("data_location")) == str(directory)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes], links: _Links) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    links.close()


class _Links:
    """A temporary directory with a link a run, kept up to date by a thread; plain paths where links cannot be made."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._temporary = tempfile.TemporaryDirectory(prefix="instrument-tensorboard-")
        base = Path(self._temporary.name).resolve()
        self.log = base / "tensorboard.log"
        self.directory = base / "runs"
        self.directory.mkdir()
        self._is_done = threading.Event()
        try:
            self._refresh()
        except OSError:
            self.directory = self._root
            return
        threading.Thread(target=self._keep, name="instrument-runs", daemon=True).start()

    def _refresh(self) -> None:
        for name, directory in find_runs(self._root):
            link = self.directory / name
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    link.symlink_to(directory, target_is_directory=True)

    def _keep(self) -> None:
        while not self._is_done.wait(REFRESH_SECONDS):
            # The disk may be full or the runs gone for a while; the next round tries again.
            with contextlib.suppress(OSError):
                self._refresh()

    def close(self) -> None:
        self._is_done.set()
        self._temporary.cleanup()
