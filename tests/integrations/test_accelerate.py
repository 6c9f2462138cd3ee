"""Accelerate, with accumulation, clipping and mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import instrument

from .twins import Trained, activations, assert_gradients, assert_same_bits, gradient_norms, trained

BATCH, BATCHES, ACCUMULATE, CLIP = 4, 8, 2, 0.05


def fit(
    precision: str, watch: Callable[[nn.Module], instrument.Watcher] | None = None, prepared: bool = False
) -> tuple[Trained, Any]:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision=precision)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    watcher = watch(model) if watch and not prepared else None
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data: Any = torch.randn(BATCH * BATCHES, 4)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    watcher = watch(model) if watch and prepared else watcher
    losses, norms = [], []
    for x in loader:
        with accelerator.accumulate(model):
            loss = model(x).float().square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
                norms.append(gradient_norms(model))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return trained(model, losses, norms), watcher


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_line_beside_accelerate(precision: str, prepared: bool) -> None:
    """Watched before or after `prepare`: same bits; accumulated, clipped gradients; a step for every two batches."""
    plain, _ = fit(precision)
    assert len(plain.norms) == BATCHES // ACCUMULATE
    watched, watcher = fit(
        precision, lambda model: instrument.watch(model, exclude="2", interval=1, strict=True), prepared
    )
    assert_same_bits(watched, plain)
    assert watcher.current_step == BATCHES // ACCUMULATE
    assert_gradients(watcher.history, plain, "**")
    expected = {"0": 8, "1": 8, "3": 1, "Sequential": 1}
    counts = {name: width * BATCH * ACCUMULATE for name, width in expected.items()}
    assert [activations(record) for record in watcher.history] == [counts] * (BATCHES // ACCUMULATE)
    assert watcher.notices == ()
