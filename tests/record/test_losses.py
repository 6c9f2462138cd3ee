"""Which of the scalars that a user logs is the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import instrument
from instrument.record.losses import Losses


@pytest.mark.parametrize(
    ("tag", "is_loss"),
    [("loss", True), ("Loss/train", True), ("train_loss", True), ("value_loss", True), ("losses", False),
     ("val_loss", False), ("eval/loss", False), ("loss/test", False), ("accuracy", False), ("gloss", False)],
)  # fmt: skip
def test_a_tag_with_the_word_counts_unless_it_is_held_out(tag: str, is_loss: bool) -> None:
    """The word "loss" must be part of the tag, and no other word may tell of held-out data."""
    assert Losses().wants(tag) == is_loss


def test_the_first_tag_that_counts_is_the_loss() -> None:
    """Later tags that would count are passed over, so that two losses are never mixed."""
    losses = Losses()
    for tag, step, value in (("train_loss", 0, 1.0), ("aux_loss", 0, 9.0), ("train_loss", 3, 2.0)):
        losses.add(tag, step, value)
    assert [losses.at(step) for step in (0, 2, 3, 9)] == [1.0, 1.0, 2.0, 2.0]
    assert losses.at(9, since=3) is None


def test_our_writer_sees_losses_of_any_make(tmp_path: Path) -> None:
    """Numbers, tensors that require a gradient, and NaN are taken as torch takes them; without a step they are not."""
    with instrument.SummaryWriter(tmp_path) as writer:
        writer.add_scalar("loss", torch.tensor(0.5, requires_grad=True), 1)
        writer.add_scalar("loss", 0.25, 2)
        writer.add_scalar("loss", 9.0)
    assert [writer.losses.at(step) for step in (0, 1, 2, 3)] == [None, 0.5, 0.25, 0.25]
