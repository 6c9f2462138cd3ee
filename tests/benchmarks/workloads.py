"""The three trainings that are timed: a transformer, a CNN, and very many very small layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

__all__ = ["WORKLOADS", "Training", "Workload"]


class Attention(nn.Module):
    """Causal self-attention with a matrix each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (batch, time, width), as is what comes back."""
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = self.proj(out.transpose(1, 2).reshape(batch, time, width))
        return result


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a path of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (batch, time, width)."""
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Predicts the next of 65 characters: 2.7 M parameters in 84 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(65, 192), nn.Embedding(128, 192)
        self.blocks = nn.ModuleList([TransformerBlock(192, 6) for _ in range(6)])
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, 65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, time, 65) for characters of shape (batch, time)."""
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


class Residual(nn.Module):
    """Two convolutions with batch norm beside a path that is as narrow as it can be."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.short = nn.Sequential()
        if inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (batch, channels, height, width)."""
        out = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        result: torch.Tensor = self.act2(out + self.short(x))
        return result


def cnn() -> nn.Module:
    """A residual network of 14 layers for 32 x 32 pixels: 0.18 M parameters in 47 tensors."""
    widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *(Residual(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Deep(nn.Module):
    """400 linear layers of width 32 and a head: 802 parameter tensors, none above 1024 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(400)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, 10) for an input of shape (batch, 32)."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: torch.Tensor = self.head(x)
        return out


class Training:
    """A model, its optimizer and one batch.

    Args:
        model: The model.
        inputs: What it is given.
        targets: Classes, of shape (n,), for logits that are flattened to (n, classes).
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._inputs = inputs
        self._targets = targets

    def step(self, before: Callable[[], object] = lambda: None) -> None:
        """One step; `before` is called when the gradients are there."""
        self.optimizer.zero_grad()
        logits = self.model(self._inputs)
        functional.cross_entropy(logits.flatten(0, -2), self._targets).backward()
        before()
        self.optimizer.step()


class Workload(NamedTuple):
    """A training that is timed."""

    title: str
    make: Callable[[], Training]
    threads: int | None
    """Threads of torch; None for all cores."""
    steps: int
    """Steps a block."""


def _seeded() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def _w1() -> Training:
    generator = _seeded()
    tokens = torch.randint(65, (16, 129), generator=generator)
    return Training(Transformer(), tokens[:, :-1], tokens[:, 1:].flatten())


def _w2() -> Training:
    generator = _seeded()
    images = torch.randn(32, 3, 32, 32, generator=generator)
    return Training(cnn(), images, torch.randint(10, (32,), generator=generator))


def _w3() -> Training:
    generator = _seeded()
    return Training(Deep(), torch.randn(32, 32, generator=generator), torch.randint(10, (32,), generator=generator))


WORKLOADS = {
    # A second or so, of which the flush at the end of a block, which no training has, is a hundredth.
    "w1": Workload("W1: char transformer, 2.7 M parameters in 84 tensors, batch 16 x 128", _w1, None, 3),
    "w2": Workload("W2: CNN with batch norm, 0.18 M parameters in 47 tensors, batch 32", _w2, None, 8),
    "w3": Workload("W3: 400 linear layers of width 32, 802 parameter tensors, one thread", _w3, 1, 20),
}
