"""A budget: steps are sampled as often as a share of the training time allows.

What is paid for is the time that our hooks keep the training thread, and the time of the processor that the writer's
thread takes, since on a machine whose cores are all at work that is taken from the training too. What a sampled step
costs beyond that, in caches and by the interpreter lock, is not seen.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from instrument.capture.hooks import PassListener, Taps
from instrument.capture.names import Site
from instrument.capture.steps import StepListener

__all__ = ["Budget", "Meter", "MeteredSteps", "MeteredTaps"]

WINDOW = 8
"""Sampled steps that the cost of one is averaged over."""

RELAX = 0.7
"""The interval shrinks only where this share of the budget would do, so that it does not go to and fro."""


class Meter:
    """Adds up how long it is entered; calls within calls count once.

    Args:
        clock: Gives seconds.

    Example:
        >>> meter = Meter(iter([1.0, 3.5]).__next__)
        >>> with meter, meter:
        ...     pass
        >>> meter.seconds
        2.5
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        """Time within, of all threads."""
        self._clock = clock
        self._local = threading.local()

    def __enter__(self) -> None:
        depth = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        if not depth:
            self._local.start = self._clock()

    def __exit__(self, *exception: object) -> None:
        self._local.depth -= 1
        if not self._local.depth:
            self.seconds += self._clock() - self._local.start


class Budget:
    """Finds how far the interval must be stretched.

    Args:
        share: Share of the training time that the watch may take, above 0 and below 1.
        interval: Steps between samples where nothing is stretched.
        meter: Adds up what the training thread spends.
        written: Gives the seconds of the processor that the writer's thread has spent so far.
        clock: Gives seconds.
    """

    def __init__(
        self,
        share: float,
        interval: int,
        meter: Meter,
        written: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share = share
        self._interval = interval
        self._meter = meter
        self._written = written
        self._clock = clock
        self._factor = 1
        self._seen: deque[tuple[int, float, float, float]] = deque(maxlen=WINDOW + 1)

    def factor_after(self, step: int) -> int:
        """What the interval is to be multiplied by, now that a sampled step is over.

        The first sampled step, in which much happens for the first time, is not counted.

        Args:
            step: Number of that step.

        Returns:
            1, 2, 5, 10, 20, 50 ...
        """
        self._seen.append((step, self._clock(), self._meter.seconds, self._written()))
        if len(self._seen) < 2:
            return self._factor
        first, last = self._seen[0], self._seen[-1]
        steps, elapsed = last[0] - first[0], last[1] - first[1]
        busy, written = last[2] - first[2], last[3] - first[3]
        length = (elapsed - busy) / steps if steps > 0 else 0.0
        if length <= 0:
            return self._factor
        cost = (busy + written) / (len(self._seen) - 1)
        # Of N steps one is sampled: its cost is at most the share of N steps and itself.
        wanted = cost * (1 - self._share) / (self._share * length * self._interval)
        if wanted > self._factor or wanted <= RELAX * _below(self._factor):
            self._factor = _round_up(wanted)
        return self._factor


def _round_up(wanted: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 ... that is not below a number."""
    factor = 1
    while factor < wanted:
        factor = _above(factor)
    return factor


def _above(factor: int) -> int:
    return factor * 5 // 2 if str(factor)[0] == "2" else factor * 2


def _below(factor: int) -> int:
    """The next lower factor; 0 below 1."""
    return factor * 2 // 5 if str(factor)[0] == "5" else factor // 2


class MeteredTaps(Taps):
    """Taps whose time is taken.

    Args:
        meter: Adds up the time.
        model: As for `Taps`.
        listener: As for `Taps`.
        always_tell: As for `Taps`.
    """

    def __init__(self, meter: Meter, model: nn.Module, listener: PassListener, always_tell: bool = False) -> None:
        super().__init__(model, listener, always_tell)
        self._meter = meter

    def root_starts(self, module: nn.Module) -> None:
        """The root is called."""
        with self._meter:
            super().root_starts(module)

    def root_ends(self, output: Any) -> None:
        """The root has returned."""
        with self._meter:
            super().root_ends(output)

    def module_called(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A selected module has returned."""
        with self._meter:
            super().module_called(name, module, inputs, output)

    def gradient_arrived(self, site: Site, gradient: torch.Tensor, forward: Any) -> None:
        """The gradient of a module's output is there."""
        with self._meter:
            super().gradient_arrived(site, gradient, forward)


class MeteredSteps:
    """Hands on what the clock tells, and takes the time of that.

    Args:
        meter: Adds up the time.
        listener: Is told.
    """

    def __init__(self, meter: Meter, listener: StepListener) -> None:
        self._meter = meter
        self._listener = listener

    def step_starts(self, optimizer: torch.optim.Optimizer, index: int, closure: bool) -> None:
        """An optimizer is about to make a step."""
        with self._meter:
            self._listener.step_starts(optimizer, index, closure)

    def step_ends(self, optimizer: torch.optim.Optimizer, index: int, closure: bool) -> None:
        """An optimizer has made a step."""
        with self._meter:
            self._listener.step_ends(optimizer, index, closure)
