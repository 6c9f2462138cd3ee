"""Small trainings for tests, and TensorBoard's own reader for what they wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

Loop = Callable[[nn.Module, torch.optim.Optimizer, int], list[float]]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers around a ReLU, with dropout so that the random state matters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)).to(dtype)


def batch(step: int, size: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same input for the same step, apart from the global random state."""
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """A plain loop; returns the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(batch(step, dtype=dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def read_back(logdir: str | Path) -> tuple[dict[str, list[int]], dict[str, dict[int, float]]]:
    """Steps of each histogram tag, and values by step of each scalar tag, as TensorBoard's reader gives them."""
    accumulator = EventAccumulator(str(logdir), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    histograms = {tag: [event.step for event in accumulator.Histograms(tag)] for tag in tags["histograms"]}
    scalars = {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags["scalars"]}
    return histograms, scalars


def hooks_on(model: nn.Module) -> int:
    """Hooks of any kind on a model's modules, parameters and on torch's optimizers."""
    from torch.optim import optimizer as torch_optimizer

    count = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                count += len(value)
    for parameter in model.parameters():
        count += len(parameter._backward_hooks or ())
        count += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return count


def state_of(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}
