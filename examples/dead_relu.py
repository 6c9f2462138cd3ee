"""A learning rate that is too high kills ReLU units: the report names them, and a lower rate is compared.

Learns scikit-learn's handwritten digits twice, from the same beginning.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional

import instrument

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("this example learns scikit-learn's digits: pip install scikit-learn")


def train(lr: float, steps: int, images: torch.Tensor, digits: torch.Tensor) -> str:
    """Train under watch, print what was found, and return where the run was written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with instrument.watch(model, interval=25, scalar_interval=5) as watcher:
        for step in range(steps):
            chosen = torch.randint(len(images), (128,))
            loss = functional.cross_entropy(model(images[chosen]), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.writer.add_scalar("loss/train", loss.item(), step)
    print(f"--- learning rate {lr}: loss {loss.item():.3f} after {steps} steps\n\n{watcher.report()}\n")
    for name, units in watcher.dead_units().items():
        if units.dead:
            share = f"{len(units.dead)} of {units.units} units dead"
            print(
                f"{name}: {share} (at most {100 * units.rate_bound:.2f} % of samples reach one): {units.dead[:8]} ..."
            )
    return str(watcher.logdir)


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 400,
    high: Annotated[float, typer.Option(help="The learning rate that is too high.")] = 0.05,
    low: Annotated[float, typer.Option(help="The other one.")] = 0.001,
) -> None:
    """Train twice and compare."""
    pixels, labels = load_digits(return_X_y=True)
    images, digits = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    runs = [train(lr, steps, images, digits) for lr in (high, low)]
    print("\n--- where they part", flush=True)
    subprocess.run([sys.executable, "-m", "instrument", "compare", *runs], check=True)  # noqa: S603  # our own command
    print(f"which units died, and when:  instrument dead {runs[0]} --png dead.png")
    print(f"see both:                    instrument tensorboard {runs[0].split('/')[0]}")


if __name__ == "__main__":
    typer.run(main)
