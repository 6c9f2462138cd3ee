"""On a GPU: one large tensor beside one read of it, and GPT-2 small in bfloat16, every step sampled, ours over bare."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .harness import ratios

WIDTH, HEADS, LAYERS, TOKENS, LENGTH = 768, 12, 12, 50257, 1024
BATCHES = (8, 32)


def run(console: Console, rounds: int = 15, steps: int = 4) -> None:
    """Print the tables; one line where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        console.print("gpu: there is none here, so nothing was measured")
        return
    _one_tensor(console)
    for batch in BATCHES:
        _training(console, batch, rounds, steps)


def _training(console: Console, batch: int, rounds: int, steps: int) -> None:
    import torch

    import instrument

    kinds: dict[str, list[str] | None] = {
        "bare": None,
        "parameters and gradients": ["parameters", "gradients"],
        "all activations besides": ["activations", "parameters", "gradients"],
    }
    tokens = torch.randint(TOKENS, (batch, LENGTH), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        models, watchers = [], []
        for number, wanted in enumerate(kinds.values()):
            model = _gpt()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            models.append((model, optimizer))
            if wanted is not None:
                watchers.append(instrument.watch(model, interval=1, kinds=wanted, logdir=f"{directory}/{number}"))
        timed = [[_seconds(*pair, tokens, steps) for pair in models] for _ in range(rounds + 2)][2:]
        pairs = zip(watchers, models[1:], strict=True)
        writers = [0.0, *(_writer_milliseconds(watcher, *pair, tokens) for watcher, pair in pairs)]
        busy = [_device_milliseconds(*pair, tokens) for pair in models]
        for watcher in watchers:
            watcher.close()
    title = f"GPT-2 small, bfloat16, {batch} x {LENGTH} tokens, every step sampled, {torch.cuda.get_device_name()}"
    table = Table(title=title)
    for heading in ("", "ms a step", "ratio", "quartiles", "kernels, ms", "ratio", "training thread, CPU ms", "writer"):
        table.add_column(heading, justify="right")
    for place, name in enumerate(kinds):
        found = ratios([(row[0][0], row[place][0]) for row in timed])
        wall, own = (1e3 * float(np.median([row[place][column] for row in timed])) / steps for column in (0, 1))
        of_kernels = (f"{busy[place]:.1f}", f"{busy[place] / busy[0]:.3f}")
        spread = f"{found.low:.3f} to {found.high:.3f}"
        of_host = (f"{own:.1f}", f"{writers[place]:.1f}")
        table.add_row(name, f"{wall:.1f}", f"{found.median:.3f}", spread, *of_kernels, *of_host)
    console.print(table)


def _gpt() -> Any:
    import torch
    from torch import nn

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=True
                )
                for _ in range(LAYERS)
            )
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device, x.dtype)
            for block in self.blocks:
                x = block(x, src_mask=mask, is_causal=True)
            out: torch.Tensor = self.norm(x) @ self.tokens.weight.T
            return out

    torch.manual_seed(0)
    return Gpt().to("cuda", torch.bfloat16)


def _seconds(model: Any, optimizer: Any, tokens: Any, steps: int) -> tuple[float, float]:
    """How long steps take, and how much of that the training thread computes."""
    import torch
    from torch.nn import functional

    torch.cuda.synchronize()
    start, own = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    own = time.thread_time() - own
    torch.cuda.synchronize()
    return time.perf_counter() - start, own


def _writer_milliseconds(watcher: Any, model: Any, optimizer: Any, tokens: Any, steps: int = 10) -> float:
    """Milliseconds of the processor that the writer's thread takes for a step, between two drawings of pictures.

    Those are drawn at flush 1, 2, 4, 8 ..., which are ten steps apart: on steps 70 and 150 here.
    """
    _seconds(model, optimizer, tokens, steps)
    watcher.flush()
    before = watcher._written()
    _seconds(model, optimizer, tokens, steps)
    watcher.flush()
    return 1e3 * float(watcher._written() - before) / steps


def _device_milliseconds(model: Any, optimizer: Any, tokens: Any, steps: int = 3) -> float:
    """How long kernels and copies of a step keep the device busy, side by side or not."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _seconds(model, optimizer, tokens, steps)
    return float(sum(event.device_time_total for event in profiler.key_averages())) / 1e3 / steps


def _one_tensor(console: Console, size: int = 100_000_000) -> None:
    """What measuring takes, by replays of a graph, beside reading the tensor once and copying it."""
    import torch

    from instrument.measure.device import accumulate
    from instrument.measure.sketch import empty_moments
    from instrument.measure.tensors import Values
    from instrument.torch_private import Unseen

    codes = torch.zeros(4096, dtype=torch.int64, device="cuda")
    moments = torch.tensor(empty_moments(), device="cuda")
    table = Table(title=f"one tensor of {size:,} elements, {torch.cuda.get_device_name()}")
    for heading in ("type", "measured, us", "ps an element", "GB/s", "torch.amax, us", "half a copy, us"):
        table.add_column(heading, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(size, device="cuda").to(dtype) for _ in range(3)]
        copy = torch.empty_like(tensors[0])
        with Unseen():
            ours = _microseconds(lambda tensor: accumulate(Values(tensor, 1, 0), codes, moments), tensors)
            read = _microseconds(torch.amax, tensors)
            half = _microseconds(copy.copy_, tensors) / 2
        speed = size * dtype.itemsize / ours / 1e3
        figures = (ours, 1e6 * ours / size, speed, read, half)
        table.add_row(
            str(dtype).removeprefix("torch."), *(f"{figure:.{2 if figure < 10 else 0}f}" for figure in figures)
        )
    console.print(table)


def _microseconds(function: Callable[[Any], Any], tensors: list[Any]) -> float:
    import torch

    for tensor in tensors:
        function(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensor in tensors * 5:
            function(tensor)
    found = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / (5 * len(tensors)))
    return float(np.median(found))
