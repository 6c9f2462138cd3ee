"""A deep network of sigmoids does not learn, its twins of ReLUs and of residual blocks do: the gradients say why.

All three have the same depth, width, data and learning rate.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional

import instrument

WIDTH = 64


class Residual(nn.Module):
    """A layer beside a path that carries its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, width) in and out."""
        return x + functional.relu(self.linear(x)) / 4


def layer(kind: str) -> nn.Module:
    """One layer of a twin."""
    if kind == "residual":
        return Residual()
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid() if kind == "sigmoid" else nn.ReLU())


def main(
    depth: Annotated[int, typer.Option(help="Layers of each network.")] = 12,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
) -> None:
    """Train the three, and print how large the gradients of each layer are."""
    gradients, runs = {}, {}
    for kind in ("sigmoid", "relu", "residual"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, WIDTH), *(layer(kind) for _ in range(depth)), nn.Linear(WIDTH, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with instrument.watch(model, interval=50, scalar_interval=10) as watcher:
            for step in range(steps):
                angle, inner = 6.3 * torch.rand(256), torch.rand(256) < 0.5
                x = torch.stack((angle.cos(), angle.sin()), dim=1) * torch.where(inner, 1.0, 2.0)[:, None]
                loss = functional.cross_entropy(model(x), inner.long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                watcher.writer.add_scalar("loss/train", loss.item(), step)
        weights = [tag for tag in watcher.history[0] if tag.startswith("Gradients/") and tag.endswith("weight")]
        gradients[kind] = [watcher.history[0][tag].rms for tag in weights]
        runs[kind] = watcher.logdir
        print(f"--- {kind}: loss {loss.item():.4f} after {steps} steps (guessing has 0.69)")
        for finding in watcher.findings():
            print(finding)
        print(f"run: {watcher.logdir}\n")

    print(
        "rms of the gradients of weights at the first step\n" + "".join(f"{kind:>12}" for kind in ("layer", *gradients))
    )
    for index, row in enumerate(zip(*gradients.values(), strict=True)):
        print(f"{index:>12}" + "".join(f"{rms:>12.1e}" for rms in row))
    print(f"\nwhere two of them part:  instrument compare {runs['sigmoid']} {runs['relu']}")


if __name__ == "__main__":
    typer.run(main)
