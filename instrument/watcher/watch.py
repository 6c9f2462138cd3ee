"""`watch()` and `unwatch()`: arguments are checked, a watch is opened, and closed again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from instrument.capture.names import check_functions, check_selection
from instrument.capture.patterns import Patterns
from instrument.config import ConfigSource
from instrument.errors import RunError, warn_quietly
from instrument.record.ranks.group import position
from instrument.record.writer import sink_for
from instrument.watcher.arguments import (
    EVERYTHING,
    FIRST,
    NOTHING,
    OUTSIDE,
    USUAL_KINDS,
    check_directory,
    check_model,
    check_optimizer,
    check_step,
    settings,
)
from instrument.watcher.opening import form_group, make_writer
from instrument.watcher.watcher import Watcher, watchers

__all__ = ["unwatch", "watch", "watched_models"]


def watch(
    model: nn.Module,
    include: str | Iterable[str] = EVERYTHING,
    exclude: str | Iterable[str] = NOTHING,
    *,
    kinds: str | Iterable[str] = USUAL_KINDS,
    writer: Any = None,
    logdir: str | os.PathLike[str] | None = None,
    config: ConfigSource | None = None,
    interval: int | None = None,
    scalar_interval: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    initial_step: int = 0,
    compiled: str = OUTSIDE,
    ranks: str = FIRST,
    functions: Mapping[str, str] | None = None,
    budget: float | None = None,
    strict: bool = False,
) -> Watcher:
    """Watch a model while it trains: one line, and nothing in the training changes.

    Steps are told by the optimizers themselves. On sampled steps activations are measured inside forward hooks,
    gradients when an optimizer is about to use them, parameters when it has.

    Args:
        model: The model; wrapped or not, before or after its optimizer is made.
        include: A glob or several over names; `blocks.*` is every block and all it holds.
        exclude: A glob or several over names that are left out.
        kinds: What to watch, of "activations", "activation_gradients", "parameters", "gradients", "updates".
            Parameters are those after the step; updates are what it changed, measured on a strided sample of
            at most 65,536 elements a parameter, whose root mean square is right within 1 %.
        writer: Anything with `SummaryWriter`'s methods, to write through and never to close. Without one, our
            own `SummaryWriter` on `logdir`.
        logdir: Directory of the event files; without it, that of a new run under `runs_directory`.
        config: A path, a mapping or a `Config`; what is given here goes before it.
        interval: Steps between histograms: steps 0, N, 2N ... and the last. 0 or negative: nothing is attached
            and nothing is written.
        scalar_interval: Steps between samples for scalars; at most `interval`.
        optimizer: The one optimizer whose steps count, where they cannot be inferred.
        initial_step: Number of the first step, where a resumed run continues.
        compiled: What to do inside regions of `torch.compile`: "outside", "graph" or "eager".
        ranks: Under `torch.distributed`, after `init_process_group`: "first", rank 0 measures and writes, and the
            others do nothing; "merge", every rank measures, sketches are summed in the background at each flush,
            and rank 0 writes (all ranks must call `watch` with the same arguments; what that sends is told in
            `instrument.record.ranks.merging`: about 4 kB a site and flush, 4 ms for 1000 sites and 8 ranks on
            25 Gbit/s, on paper); "each", every rank writes a run of its own, in `rank{n}` below a given `logdir`.
        functions: Nonlinearities that are called as functions: glob over module names to function name.
        budget: Share of the training time that the watch may take, such as 0.01. Where it would take more, steps are
            sampled more rarely: every 2nd, 5th, 10th, 20th ... of those that would be, and histograms on a multiple.
        strict: Whether faults of this library are raised instead of told.

    Returns:
        The watcher; it need not be kept.

    Raises:
        ConfigError: An argument or a configuration that cannot be used.
        SelectionError: An include that matches nothing, or nothing left to watch.
        RanksError: `ranks="merge"`, and some rank did not call `watch` within 25 seconds.

    Example:
        >>> import instrument, torch, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> watcher = instrument.watch(model, include=["0"], logdir=tempfile.mkdtemp())
        >>> [site.name for site in watcher.sites if site.kind == "parameters"]
        ['0.weight', '0.bias']
        >>> watcher.close()
    """
    check_model(model)
    chosen = settings(
        config,
        interval,
        {"include": EVERYTHING, "exclude": NOTHING, "kinds": USUAL_KINDS, "compiled": OUTSIDE, "ranks": FIRST,
         "scalar_interval": None, "functions": None, "budget": None},
        include=include,
        exclude=exclude,
        kinds=kinds,
        compiled=compiled,
        ranks=ranks,
        scalar_interval=scalar_interval,
        functions=functions,
        budget=budget,
    )  # fmt: skip
    first_step = check_step(initial_step, "initial_step")
    clock = check_optimizer(optimizer)
    if chosen.histogram_interval <= 0:
        _close_earlier(model)
        return Watcher(chosen, writer, off=f"interval is {chosen.histogram_interval}")
    place = position()
    patterns = Patterns(chosen.include, chosen.exclude)
    _, notes = check_selection(model, patterns, chosen.kinds)
    check_functions(model, chosen.functions)
    sink = sink_for(writer) if writer is not None else None
    directory = check_directory(logdir)
    if chosen.ranks == "first" and place.rank > 0:
        _close_earlier(model)
        return Watcher(chosen, writer, off=f"rank 0 of {place.world} watches, this is rank {place.rank}")
    group = form_group(chosen, place)
    _close_earlier(model)
    if group is not None and group.rank > 0:
        sink = None  # rank 0 writes
    elif sink is None:
        try:
            writer = make_writer(chosen, directory, first_step, place)
        except (OSError, RunError) as error:
            warn_quietly(f"{error}; training goes on unwatched")
            return Watcher(chosen, None, off="there is no directory to write to")
        sink = sink_for(writer, is_users=False)
    watcher = Watcher(chosen, writer, sink)
    watcher._begin(model, patterns, clock, first_step, strict, notes, group)
    return watcher


def unwatch(model: nn.Module) -> None:
    """Close the watch of a model; nothing happens where there is none.

    Args:
        model: The model that was given to `watch`.

    Raises:
        ConfigError: Something else than a module was given.

    Example:
        >>> import instrument, torch
        >>> instrument.unwatch(torch.nn.Linear(1, 1))
    """
    check_model(model)
    watcher = watchers.get(id(model))
    if watcher is not None and watcher._watches(model):
        watcher.close()


def watched_models() -> list[nn.Module]:
    """The models that have an open watch now."""
    models = [watcher._model() for watcher in list(watchers.values())]
    return [model for model in models if model is not None]


def _close_earlier(model: nn.Module) -> None:
    earlier = watchers.get(id(model))
    if earlier is not None and earlier._watches(model):
        warn_quietly("this model is watched already; the earlier watch is closed", stacklevel=3)
        earlier.close()
