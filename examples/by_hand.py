"""The loop of the original document: histograms logged by hand with `TensorBoardLogger`.

For loops whose author wants to say when and what is logged; `instrument.watch` does the same in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from instrument import TensorBoardLogger, get_histogram_interval


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    logdir: Annotated[
        Path | None, typer.Option(help="Where the run is written; a new directory in runs without it.")
    ] = None,
) -> None:
    """Fit a sine, and log at the interval of the configuration."""
    torch.manual_seed(0)
    layer1, layer2 = nn.Linear(1, 32), nn.Linear(32, 1)
    model = nn.Sequential(layer1, nn.Tanh(), layer2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    interval = get_histogram_interval()
    with TensorBoardLogger(logdir) as logger:
        for step in range(steps):
            x = torch.rand(64, 1) * 6 - 3
            layer1_output = torch.tanh(layer1(x))
            loss = (layer2(layer1_output) - torch.sin(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if interval > 0 and step % interval == 0:
                logger.log_model_histograms(model, step)
                logger.log_activation_histograms({"layer1_output": layer1_output}, step)
                print(f"step {step}: loss {loss.item():.4f}")
        if logger.writer is not None:
            print(f"run: {logger.writer.log_dir}")


if __name__ == "__main__":
    typer.run(main)
