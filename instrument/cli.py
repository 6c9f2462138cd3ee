"""The commands: ``instrument run``, ``tensorboard``, ``report``, ``dead``, ``compare``, ``check``.

Whatever goes wrong with a path, a run or a port is one line on the error stream and exit code 1. Of a run with a torn
or damaged file all that is whole is shown, and then that line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from instrument.diagnose.compare import compare as compare_scalars
from instrument.diagnose.dead import DeadUnits
from instrument.diagnose.history import UnitHistory
from instrument.diagnose.report import Report
from instrument.errors import InstrumentError
from instrument.launch import launch_tensorboard
from instrument.record.events import FileCheck, check_file
from instrument.record.reading import read_scalars
from instrument.record.runs import event_files, resolve_run
from instrument.run import Script

__all__ = ["app", "main"]

PATIENCE_SECONDS = 1.0
"""Reading that takes longer shows how far it is."""

app = typer.Typer(
    help="See inside a PyTorch network while it trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or the logs/tensorboard inside it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")]


def main() -> None:
    """Run the commands; errors of ours end in one line and exit code 1."""
    scripts: list[Script] = []
    show = sys.excepthook
    try:
        try:
            app(obj=scripts)
        except SystemExit:
            sys.stdout.flush()  # a full disk is told here, and not by the interpreter as it ends
            if not scripts:
                raise
    except InstrumentError as error:
        print(f"instrument: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has nowhere to go
        if not isinstance(error, BrokenPipeError):
            print(f"instrument: {error}", file=sys.stderr)
        sys.exit(1)
    # Out here a script's exceptions, its KeyboardInterrupt and its exit code are nobody else's.
    sys.excepthook = show  # typer has set its own
    for script in scripts:
        script.run()


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help="The script; with -m the name of a module.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="All that follows is the script's.")
    ] = None,
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Glob over names to watch; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Glob over names to leave out; may be repeated.")
    ] = None,
    interval: Annotated[int | None, typer.Option(help="Steps between histograms; 0 watches nothing.")] = None,
) -> None:
    """Run an unchanged training script, and watch each model that its optimizers train."""
    given = {"include": include, "exclude": exclude, "interval": interval}
    keywords = {name: value for name, value in given.items() if value is not None and value != []}
    context.obj.append(Script(target, arguments or (), is_module, **keywords))


@app.command()
def tensorboard(
    runs: Annotated[
        Path | None,
        typer.Argument(metavar="[RUNS]", help="Directory of runs, or one run; runs_directory where not given."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="First port to try; default_port where not given.", min=1, max=65535),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration file; configs/tensorboard.json where not given."),
    ] = None,
) -> None:
    """Start TensorBoard on this machine, print its address, and run until Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    try:
        with console.status("TensorBoard is starting"):
            server = launch_tensorboard(runs, config=config, port=port)
        with server:
            print(f"TensorBoard: {server.url}  (Ctrl-C ends it)", flush=True)
            code = server.wait()
            print(f"TensorBoard ended by itself with code {code}", file=sys.stderr)
            raise typer.Exit(1)
    except KeyboardInterrupt:
        print("\nTensorBoard is stopped")


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def report(
    run: RunArgument,
    as_json: JsonOption = False,
    full: Annotated[bool, typer.Option("--full", help="Print the last value of each statistic too.")] = False,
) -> None:
    """Print the health of a run layer by layer, what was found, and what was not observed."""
    logdir = resolve_run(run)
    damages: list[str] = []
    with _LateProgress("reading", sum(path.stat().st_size for path in event_files(logdir))) as progress:
        result = Report.of_run(logdir, progress.advance, damages)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        result.print_to(Console(), full=full)
    _tell(damages)


@app.command()
def dead(
    run: RunArgument,
    layer: Annotated[str, typer.Option(metavar="GLOB", help="Only layers whose names match.")] = "**",
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the unit maps of these layers there.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the dead units of a run by layer: which, since when, and how sure that is."""
    logdir = resolve_run(run)
    damages: list[str] = []
    with _LateProgress("reading", sum(path.stat().st_size for path in event_files(logdir))) as progress:
        history = UnitHistory.of_run(logdir, progress.advance, damages)
    result = DeadUnits.of_history(history, layer, str(run))
    if png is not None:
        result.save_png(png)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        result.print_to(Console())
        if png is not None:
            print(f"unit maps: {png}")
    _tell(damages)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The run to compare it with.")],
    as_json: JsonOption = False,
) -> None:
    """Tell where two runs part: the layers and the steps from which on their statistics differ."""
    logdirs = [resolve_run(run) for run in (first, second)]
    damages: list[str] = []
    with _LateProgress(
        "reading", sum(path.stat().st_size for each in logdirs for path in event_files(each))
    ) as progress:
        result = compare_scalars(*(read_scalars(logdir, progress.advance, damages) for logdir in logdirs))
    if as_json:
        print(json.dumps({"first": str(first), "second": str(second), **result.as_dict()}, indent=2))
    else:
        print(f"A: {first}\nB: {second}")
        result.print_to(Console())
    _tell(damages)


def _tell(damages: Sequence[str]) -> None:
    """Tell what files are damaged, after what could be read."""
    for damage in damages:
        print(f"instrument: {damage}", file=sys.stderr)
    if damages:
        raise typer.Exit(1)


@app.command()
def check(run: RunArgument, as_json: JsonOption = False) -> None:
    """Check whether the event files of a run are whole; exit code 1 where one is not."""
    paths = event_files(resolve_run(run))
    with _LateProgress("checking", sum(path.stat().st_size for path in paths)) as progress:
        checks = [check_file(path, progress.advance) for path in paths]
    if as_json:
        print(json.dumps([found.as_dict() for found in checks], indent=2))
    else:
        for found in checks:
            print(_in_words(found))
    if any(found.damage is not None for found in checks):
        raise typer.Exit(1)


def _in_words(found: FileCheck) -> str:
    steps = "no steps" if found.last_step is None else f"last step {found.last_step}"
    text = f"{found.path.name}: {found.records} records, {found.size} bytes, {steps}"
    if found.damage is None:
        return f"{text}, whole"
    return f"{text}, DAMAGED at byte {found.damage.offset}: {found.damage.reason}; what comes before can be read"


class _LateProgress:
    """A progress bar on the error stream that appears only when the work takes longer than a second."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def advance(self, size: int) -> None:
        """Tell how many bytes are done more."""
        self._done += size
        if self._bar is None and time.monotonic() - self._start > PATIENCE_SECONDS:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def __enter__(self) -> _LateProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    main()
