"""GPT-2 small training in bfloat16 on a GPU, every step sampled: ours over bare, in turns."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import ratios

WIDTH, HEADS, LAYERS, TOKENS, LENGTH, BATCH = 768, 12, 12, 50257, 1024, 8


def run(console: Console, rounds: int = 15, steps: int = 4) -> None:
    """Print the table; one line where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        console.print("gpu: there is none here, so nothing was measured")
        return
    import instrument

    kinds: dict[str, list[str] | None] = {
        "bare": None,
        "parameters and gradients": ["parameters", "gradients"],
        "all activations besides": ["activations", "parameters", "gradients"],
    }
    tokens = torch.randint(TOKENS, (BATCH, LENGTH), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        models, watchers = [], []
        for number, wanted in enumerate(kinds.values()):
            model = _gpt()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            models.append((model, optimizer))
            if wanted is not None:
                watchers.append(instrument.watch(model, interval=1, kinds=wanted, logdir=f"{directory}/{number}"))
        timed = [[_seconds(*pair, tokens, steps) for pair in models] for _ in range(rounds + 2)][2:]
        for watcher in watchers:
            watcher.close()
    table = Table(title=f"GPT-2 small, bfloat16, {BATCH} x {LENGTH} tokens, {torch.cuda.get_device_name()}")
    for heading in ("every step sampled", "ms a step", "ratio", "quartiles"):
        table.add_column(heading, justify="right")
    for place, name in enumerate(kinds):
        found = ratios([(row[0], row[place]) for row in timed])
        middle = 1e3 * sorted(row[place] for row in timed)[rounds // 2] / steps
        table.add_row(name, f"{middle:.1f}", f"{found.median:.3f}", f"{found.low:.3f} to {found.high:.3f}")
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


def _seconds(model: Any, optimizer: Any, tokens: Any, steps: int) -> float:
    import torch
    from torch.nn import functional

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start
