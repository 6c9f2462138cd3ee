"""A character-level GPT that learns to write Python, with one line of `instrument.watch`.

It trains on the source files of Python's standard library, which are on every machine; --text takes another file.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import nn
from torch.nn import functional

import instrument


class SelfAttention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix each position with those before it; x and the result are (batch, time, width)."""
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        key, query, value = (part(x).view(split).transpose(1, 2) for part in (self.key, self.query, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class FeedForward(nn.Module):
    """Two linear layers around a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position by itself."""
        out: torch.Tensor = self.net(x)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sa = SelfAttention(width, heads)
        self.ffwd = FeedForward(width)
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Communicate, then compute."""
        x = x + self.sa(self.ln1(x))
        out: torch.Tensor = x + self.ffwd(self.ln2(x))
        return out


class CharGPT(nn.Module):
    """A small GPT over characters."""

    def __init__(self, characters: int, context: int, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.context = context
        self.token_embedding_table = nn.Embedding(characters, width)
        self.position_embedding_table = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, characters) of the next character, for tokens (batch, time)."""
        positions = torch.arange(tokens.shape[1])
        x = self.token_embedding_table(tokens) + self.position_embedding_table(positions)
        logits: torch.Tensor = self.lm_head(self.ln_f(self.blocks(x)))
        return logits

    @torch.no_grad()
    def write(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Continue tokens (1, time) by a number of characters."""
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[:, -1]
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        return tokens


def read_text(path: Path | None) -> str:
    """The text of a file, or the sources of the standard library; what is not ASCII becomes a question mark."""
    files = [path] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return (
        "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        .encode("ascii", "replace")
        .decode()
    )


def main(
    text: Annotated[Path | None, typer.Option(help="Text to learn from; Python's own sources without it.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 32,
    context: Annotated[int, typer.Option(help="Characters a sequence.")] = 64,
    interval: Annotated[int, typer.Option(help="Steps between histograms; 0 watches nothing.")] = 25,
    logdir: Annotated[
        Path | None, typer.Option(help="Where the run is written; a new directory in runs without it.")
    ] = None,
) -> None:
    """Train, and show what the watch saw."""
    torch.manual_seed(1337)
    corpus = read_text(text)
    characters = sorted(set(corpus))
    index = {character: number for number, character in enumerate(characters)}
    data = torch.tensor([index[character] for character in corpus])
    train, held_out = data[: -len(data) // 10], data[-len(data) // 10 :]

    def draw(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(source) - context - 1, (batch, 1)) + torch.arange(context + 1)
        sequences = source[starts]
        return sequences[:, :-1], sequences[:, 1:]

    def loss_on(source: torch.Tensor) -> torch.Tensor:
        tokens, targets = draw(source)
        return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    model = CharGPT(len(characters), context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watcher = instrument.watch(model, interval=interval, logdir=logdir)

    for step in track(range(steps), "training"):
        loss = loss_on(train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.writer.add_scalar("loss/train", loss.item(), step)
        if step % 100 == 0 or step == steps - 1:
            model.eval()
            with torch.no_grad():
                held_out_loss = torch.stack([loss_on(held_out) for _ in range(8)]).mean().item()
            model.train()
            watcher.writer.add_scalar("loss/held_out", held_out_loss, step)
    watcher.close()

    model.eval()
    print(f"\nIt writes: {''.join(characters[i] for i in model.write(data[None, :1], 200)[0].tolist())!r}\n")
    print(watcher.report())
    print(
        f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps, held-out loss {held_out_loss:.3f}"
    )
    print(f"run:  {watcher.logdir}")
    print(f"see:  instrument tensorboard {watcher.logdir}")


if __name__ == "__main__":
    typer.run(main)
