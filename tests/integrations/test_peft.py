"""LoRA of PEFT: a frozen model with small matrices beside some of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn

import instrument

from .test_transformers import BATCH, LENGTH, VOCABULARY, gpt2
from .twins import Trained, activations, assert_gradients, assert_same_bits, gradient_norms, trained

RANK, STEPS = 3, 4


def fit(watch: Callable[[nn.Module], instrument.Watcher] | None = None, early: bool = False) -> tuple[Trained, Any]:
    transformers.set_seed(0)
    base = gpt2()
    watcher = watch(base) if watch and early else None
    settings = peft.LoraConfig(r=RANK, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    model: Any = peft.get_peft_model(base, settings)
    watcher = watch(model) if watch and not early else watcher
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses, norms = [], []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(gradient_norms(model))
        optimizer.step()
        losses.append(loss.item())
    return trained(model, losses, norms), watcher


def test_one_line_around_lora() -> None:
    """Same bits; gradients of the small matrices alone, since the others have none; their outputs are recorded."""
    plain, _ = fit()
    assert all(set(norms) and all("lora_" in name for name in norms) for norms in plain.norms)
    watched, watcher = fit(
        lambda model: instrument.watch(model, include=r"re:.*\.lora_[AB].*", interval=1, strict=True)
    )
    assert_same_bits(watched, plain)
    assert watcher.current_step == STEPS
    assert_gradients(watcher.history, plain, "**")
    layer = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.default"
    widths = {"A": RANK, "B": 3 * 16}
    expected = {layer.format(i, side): BATCH * LENGTH * width for i in (0, 1) for side, width in widths.items()}
    assert [activations(record) for record in watcher.history] == [expected] * STEPS
    # `**` may reach into the outputs of what LoRA passes by (it calls `forward`); the notice names no matrix.
    assert not any("lora_" in notice for notice in watcher.notices)


def test_lora_that_is_added_after_the_line() -> None:
    """Small matrices that come after `watch` are followed under the names of the model that was given."""
    plain, _ = fit()
    watched, watcher = fit(lambda model: instrument.watch(model, interval=1, strict=True), early=True)
    assert_same_bits(watched, plain)
    prefix = "base_model.model."
    norms = [{name.removeprefix(prefix): norm for name, norm in step.items()} for step in plain.norms]
    assert_gradients(watcher.history, plain._replace(norms=norms), "**")
    # LoRA calls `forward` of the base and not the base, so that activations are followed from the second step on.
    for record in list(watcher.history)[1:]:
        assert activations(record)["transformer.h.1.attn.c_attn.lora_A.default"] == BATCH * LENGTH * RANK
    assert [notice for notice in watcher.notices if "without activations" in notice]
    assert watcher.current_step == STEPS
