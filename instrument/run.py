"""``instrument run``: an unchanged script, with the models that its optimizers train watched.

What shaped it:

* the script shall not notice: it is ``__main__``, with its own arguments, path, output, traceback and exit code;
* step 0 counts, so a model must be known before its first forward pass. That is when its optimizer is made, and
  `torch.optim.Optimizer.__init__` is wrapped for it, in this process, which is there for the script alone. torch's
  hooks on steps come too late, and those on all modules would be taken into compiled graphs;
* the module that the parameters belong to is found among the objects that Python's collector knows: torch's hooks on
  registration never hear of modules that were copied or unpickled;
* watches are closed when the interpreter exits, when threads of the script that still train have ended.

One difference is left: torch is imported before the script begins, so what torch reads from the environment while it
is imported, such as OMP_NUM_THREADS, must be set outside the script.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import gc
import importlib.machinery
import importlib.util
import os
import sys
import types
import weakref
from collections.abc import Sequence
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from instrument.capture.names import named_modules
from instrument.errors import InstrumentError, RunError, keep_interrupt
from instrument.record.runs import LOGS, event_files
from instrument.torch_private import children_of, parameters_of
from instrument.watcher.keywords import check_keywords
from instrument.watcher.watch import watch, watched_models
from instrument.watcher.watcher import Watcher

__all__ = ["ModelFinder", "Script"]

MOST_MODELS = 64
"""Models that are watched at most: each has an event file and a thread while it lives, and scripts that train a
thousand copies (meta-learning) make a thousand optimizers."""


class Script:
    """A script or module that is ready to run as ``__main__``.

    Args:
        target: Path of the script, or name of the module.
        arguments: Its arguments.
        is_module: Whether the target is the name of a module, as for ``python -m``.
        keywords: Keywords of `instrument.watch` for each model.

    Raises:
        RunError: There is no such script, or it cannot be read.
        ConfigError: A keyword that cannot be used.
        SelectionError: A pattern that cannot be read.
    """

    def __init__(self, target: str, arguments: Sequence[str] = (), is_module: bool = False, **keywords: Any) -> None:
        self._target = target
        self._arguments = list(arguments)
        self._finder = ModelFinder(**keywords)
        self._source: bytes | None = None
        if not is_module:
            try:
                self._source = Path(target).read_bytes()
            except FileNotFoundError:
                raise RunError(f"there is no script {target}") from None
            except OSError as error:
                raise RunError(f"script {target} cannot be read: {error.strerror}") from None

    def run(self) -> None:
        """Run as ``__main__``; what the script raises comes out, and its traceback will begin in the script."""
        self._finder.start()
        try:
            code, main = self._loaded_module() if self._source is None else self._loaded_script(self._source)
            sys.modules["__main__"] = main
            exec(code, main.__dict__)  # noqa: S102  # running a script is what this is for
        except SystemExit:
            raise
        except BaseException as error:
            _show_without_us(error)
            raise

    def _loaded_script(self, source: bytes) -> tuple[types.CodeType, types.ModuleType]:
        """Compile the script and make its module, with `sys.argv` and `sys.path` as Python makes them."""
        sys.argv[:] = [self._target, *self._arguments]
        _set_first_path(os.path.dirname(os.path.realpath(self._target)))  # noqa: PTH120  # exactly what Python does
        path = os.path.abspath(self._target)  # noqa: PTH100  # symbolic links stay, as they do in __file__
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        main = _main_module(__file__=path, __cached__=None, __loader__=loader)
        return compile(source, path, "exec", dont_inherit=True), main

    def _loaded_module(self) -> tuple[types.CodeType, types.ModuleType]:
        """Find a module, or the ``__main__`` of a package, as ``python -m`` does."""
        sys.argv[:] = ["-m", *self._arguments]
        _set_first_path(str(Path.cwd()))
        spec = _spec_of(self._target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = _spec_of(f"{self._target}.__main__")
        loader = spec.loader if spec is not None else None
        code = loader.get_code(spec.name) if spec is not None and isinstance(loader, InspectLoader) else None
        if spec is None or code is None:
            sys.exit(f"instrument: there is no module {self._target} that can be run")
        sys.argv[0] = str(spec.origin)
        main = _main_module(
            __file__=spec.origin, __cached__=spec.cached, __loader__=loader, __spec__=spec, __package__=spec.parent
        )
        return code, main


def _spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise  # the package above exists and lacks something that it imports


def _set_first_path(directory: str) -> None:
    """Put the script's directory where Python puts it, in place of that of the command."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [directory]


def _main_module(**attributes: Any) -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__dict__.update({"__builtins__": builtins, "__annotations__": {}, **attributes})
    return main


def _show_without_us(error: BaseException) -> None:
    """Have this exception shown, when it ends the process, from the script's first frame on."""
    show = sys.excepthook  # by now it may be the script's own

    def show_from_the_script(
        kind: type[BaseException], raised: BaseException, trace: types.TracebackType | None
    ) -> None:
        if raised is error:
            while trace is not None and trace.tb_frame.f_code.co_filename != __file__:
                trace = trace.tb_next
            while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            raised.__traceback__ = trace
        show(kind, raised, trace)

    sys.excepthook = show_from_the_script


class ModelFinder:
    """Watches each model whose parameters an optimizer owns, from when the optimizer is made.

    The first model's run is a run directory as `watch` makes it. Where there are several, each has a run of its own
    inside that directory, by the name of its class: ``runs/2026-02-10_001/Generator``.

    Args:
        keywords: Keywords of `instrument.watch` for each model.

    Raises:
        ConfigError: A keyword that cannot be used.
        SelectionError: A pattern that cannot be read.
    """

    def __init__(self, **keywords: Any) -> None:
        self._keywords, config = check_keywords(keywords)
        self._interval = config.histogram_interval
        self._pid = os.getpid()
        self._runs: list[_Run] = []
        self._refused: list[weakref.ref[nn.Module]] = []
        self._directory: Path | None = None
        self._has_script_watches = False

    def start(self) -> None:
        """Begin to look, in this process and for good; close the watches and say where the runs are at its exit."""
        atexit.register(self.finish)
        if self._interval <= 0:
            return
        make = torch.optim.Optimizer.__init__

        @functools.wraps(make)
        def make_and_look(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            make(optimizer, *args, **kwargs)
            self._optimizer_made(optimizer)

        torch.optim.Optimizer.__init__ = make_and_look  # type: ignore[assignment, method-assign]

    def finish(self) -> None:
        """Close the watches, and say in one line where the runs are."""
        if os.getpid() != self._pid:  # a child of the script that was forked from it
            return
        for run in self._runs:
            run.watcher.close()
        line = self._line()
        if line:
            _say(line)
        keep_interrupt()

    def _line(self) -> str:
        if self._interval <= 0:
            return f"nothing was watched: the interval is {self._interval}"
        if not self._runs:
            found = self._refused or self._has_script_watches
            return "" if found else "no model was found: no optimizer was made for the parameters of a torch.nn.Module"
        if self._directory is None:  # said already when the directory could not be made
            return ""
        steps = [f"{run.name} ({run.watcher.current_step} steps)" for run in self._runs]
        what = f"{len(steps)} models: {', '.join(steps)}" if len(steps) > 1 else steps[0]
        return f"watched {what}; the run is {self._directory}"

    def _optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        try:
            owned = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, nn.Parameter)]
            if not owned or len(self._runs) >= MOST_MODELS:
                return
            known = [*watched_models(), *(model for ref in self._refused if (model := ref()) is not None)]
            unknown = {id(p) for p in owned} - {id(p) for model in known for p in model.parameters()}
            self._has_script_watches |= len(unknown) < len({id(p) for p in owned})
            for model in _models_that_hold(unknown) if unknown else ():
                self._begin(model)
        except Exception as error:  # whatever it is, the script goes on
            _say(f"this library failed with {type(error).__name__}: {error}; this optimizer's model is not watched")

    def _begin(self, model: nn.Module) -> None:
        name = self._free_name(named_modules(model)[0].name)
        try:
            if self._directory is not None:
                self._name_first_run()
            watcher = self._watch(model, name if self._directory is not None else None)
        except InstrumentError as error:
            self._refused.append(weakref.ref(model))
            _say(f"{name} is not watched: {error}")
            return
        self._runs.append(_Run(name, weakref.ref(model), watcher))
        if len(self._runs) == MOST_MODELS:
            _say(f"{MOST_MODELS} models are watched, no further one will be")
        if self._directory is None and watcher.logdir is not None:
            self._directory = Path(watcher.logdir).parents[len(LOGS.parts) - 1]

    def _watch(self, model: nn.Module, name: str | None) -> Watcher:
        logdir = self._directory / name / LOGS if self._directory is not None and name is not None else None
        return watch(model, logdir=logdir, **self._keywords)

    def _free_name(self, wanted: str) -> str:
        taken = {run.name for run in self._runs}
        names = (wanted, *(f"{wanted}_{number}" for number in range(2, MOST_MODELS + 2)))
        return next(name for name in names if name not in taken)

    def _name_first_run(self) -> None:
        """There is a second model: move the first one's run beside it, unless steps were recorded already."""
        first = self._runs[0]
        model = first.model()
        if len(self._runs) > 1 or model is None or first.watcher.current_step > 0 or self._directory is None:
            return
        first.watcher.close()
        empty = self._directory / LOGS
        for file in event_files(empty):
            file.unlink()
        empty.rmdir()
        empty.parent.rmdir()
        self._runs[0] = _Run(first.name, first.model, self._watch(model, first.name))


class _Run(NamedTuple):
    """A model that is watched, and the name of its run."""

    name: str
    model: weakref.ref[nn.Module]
    watcher: Watcher


def _models_that_hold(parameters: set[int]) -> list[nn.Module]:
    """The outermost modules that hold the parameters with these identities, as few as are needed.

    Of several that hold the same ones (a model, and a loss that refers to it) the smallest is taken: it is the one
    that is called.
    """
    parents: dict[int, list[nn.Module]] = {}
    owners: list[nn.Module] = []
    for module in _living_modules():
        try:
            children, own = children_of(module), parameters_of(module)
        except AttributeError:  # its __init__ has not come that far
            continue
        for _, child in children:
            parents.setdefault(id(child), []).append(module)
        if not parameters.isdisjoint(id(parameter) for parameter in own.values()):
            owners.append(module)
    roots: dict[int, nn.Module] = {}
    for owner in owners:
        roots.update({id(root): root for root in _roots_of(owner, parents)})
    held = {key: parameters & {id(p) for p in root.parameters()} for key, root in roots.items()}
    sizes = {key: sum(1 for _ in root.modules()) for key, root in roots.items()}
    chosen = []
    while held:
        best = max(held, key=lambda key: (len(held[key]), -sizes[key]))
        covered = held.pop(best)
        chosen.append(roots[best])
        held = {key: left for key, some in held.items() if (left := some - covered)}
    return chosen


def _living_modules() -> list[nn.Module]:
    """Every module in this process; asks for the type alone, since other attributes of strange objects may compute."""
    found = gc.get_objects()
    types_found = {type(thing) for thing in found}
    modules = {kind for kind in types_found if issubclass(kind, nn.Module)}
    return [thing for thing in found if type(thing) in modules]


def _roots_of(module: nn.Module, parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """The modules above this one that have none above them; itself, where modules hold each other in a circle."""
    seen: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        lower = waiting.pop()
        if id(lower) not in seen:
            seen[id(lower)] = lower
            waiting += parents.get(id(lower), [])
    return [above for key, above in seen.items() if key not in parents] or [module]


def _say(text: str) -> None:
    print(f"instrument: {text}", file=sys.stderr, flush=True)
