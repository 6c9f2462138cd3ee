"""A division by zero turns a training to NaN: the watch names the layer it began in, and shows the steps before.

`Standardize` divides by the spread of each feature over the batch and forgot the epsilon. All goes well until a unit
of the ReLU before it is silent on a whole batch: zero divided by zero.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

import torch
import typer
from torch import nn

import instrument


class Standardize(nn.Module):
    """Give each feature mean 0 and spread 1 over the batch; without an epsilon."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, features) in and out."""
        return (x - x.mean(dim=0)) / x.std(dim=0)


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps, unless the loss is NaN before.")] = 500,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.02,
) -> None:
    """Train until the loss is NaN, and say where that came from."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            embed=nn.Linear(16, 32), act=nn.ReLU(), standardize=Standardize(), mix=nn.Linear(32, 32), act2=nn.ReLU(),
            head=nn.Linear(32, 1),
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with instrument.watch(model, interval=50, scalar_interval=1) as watcher:
        for step in range(steps):
            x = torch.randn(16, 16)
            loss = (model(x) - x[:, :1].sin() * x[:, 1:2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.writer.add_scalar("loss/train", loss.item(), step)
            if not loss.isfinite():
                print(f"the loss is {loss.item()} at step {step}\n")
                break

    print(watcher.report())
    first = next((found for found in watcher.findings() if found.diagnostic == "non_finite"), None)
    if first is not None and first.site is not None:
        print(f"\nIt began in the {first.site.kind} of {first.site.name} at step {first.step}. The steps before:")
        for record in list(watcher.history)[-6:]:
            act, gradient = record["Activations/act"], record.get("Gradients/embed.weight")
            zeros, count = 100 * act.zero_fraction, gradient.nan_count if gradient is not None else 0
            print(f"  step {record.step}: {zeros:.0f} % zeros in act, {count} NaN in the gradient of embed.weight")
    print(f"\nlater:  instrument report {watcher.logdir}")


if __name__ == "__main__":
    typer.run(main)
