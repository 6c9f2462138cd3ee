"""Activation checkpointing, parametrizations and fused paths: nothing is computed, shifted or switched off by us."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import instrument

from .harness import data, of_kind, plain_step, twins


def selective(ops: list[Any]) -> Callable[[], Any]:
    """Contexts that save the results of some operations and compute all others again."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


aten = torch.ops.aten
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective, products": {
        "use_reentrant": False,
        "context_fn": selective([aten.mm.default, aten.addmm.default]),
    },
    "selective, what measuring would use": {
        "use_reentrant": False,
        "context_fn": selective([aten.sigmoid.default, aten.sum.default, aten.detach.default, aten.aminmax.default]),
    },
}


class Body(nn.Module):
    """A part with dropout, so that the recomputation must draw the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers with a sigmoid between."""
        out: torch.Tensor = self.drop(self.b(self.a(x).sigmoid()))
        return out


class Model(nn.Module):
    """A model whose bodies run under activation checkpointing, one inside a checkpointed outer one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = CHECKPOINTS[how]
        self.inp = nn.Linear(4, 8)
        self.body = Body()
        self.second = Body()
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Checkpoint both bodies."""
        y = checkpoint(self.body, self.inp(x), **self.how)
        y = checkpoint(self.second, y, **self.how)
        out: torch.Tensor = self.out(y)
        return out


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointed_training_is_bit_identical_and_counted_once(how: str, tmp_path: Path) -> None:
    """Under every kind of checkpointing gradients are bit-identical, activations counted once, gradients once."""
    watched = twins(lambda: Model(how), tmp_path)
    for record in watched.records:
        activations, gradients = of_kind(record, "Activations"), of_kind(record, "ActivationGradients")
        for name in ("body", "body.a", "body.b", "second.a", "second", "inp"):
            assert activations[name].count == 6 * 8, name
            assert gradients[name].count == 6 * 8, name


def test_gradients_under_checkpointing_are_those_without(tmp_path: Path) -> None:
    """Recorded gradients of activations are the same with and without checkpointing."""

    def without(model: Any) -> Any:
        for body in (model.body, model.second):
            body.drop.p = 0.0
        return model

    class Plain(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.second(self.body(self.inp(x))))
            return out

    plain = twins(lambda: without(Plain("reentrant")), tmp_path).records
    for how in ("reentrant", "non-reentrant"):
        found = twins(lambda how=how: without(Model(how)), tmp_path).records  # type: ignore[misc]
        for one, other in zip(found, plain, strict=True):
            for name, sketch in of_kind(other, "ActivationGradients").items():
                if name == "Plain":  # the root, which has another name there
                    continue
                assert of_kind(one, "ActivationGradients")[name].l2 == pytest.approx(sketch.l2, rel=1e-6), (how, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulation_under_checkpointing_merges_micro_batches(reentrant: bool, tmp_path: Path) -> None:
    """Three micro-batches under checkpointing are three calls, not six."""

    def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        optimizer.zero_grad()
        for micro in range(3):
            loss: torch.Tensor = model(data(10 * step + micro)).square().mean()
            loss.backward()
        optimizer.step()
        return loss

    how = "reentrant" if reentrant else "non-reentrant"
    record = twins(lambda: Model(how), tmp_path, accumulate).records[-1]
    assert record["Activations/body.a"].count == 3 * 48
    assert record["ActivationGradients/body.a"].count == 3 * 48


PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_layers_are_left_alone(how: str, tmp_path: Path) -> None:
    """No power iteration more, no mask moved: training is bit-identical, and the real parameters are named."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), PARAMETRIZED[how](nn.Linear(8, 8)))

    watched = twins(make, tmp_path)
    expected = {name for name, _ in make().named_parameters()}
    assert set(of_kind(watched.records[-1], "Parameters")) == expected
    assert set(of_kind(watched.records[-1], "Gradients")) == expected


class Double(nn.Module):
    """A parametrization added in the middle of a training."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Twice the weight."""
        return 2 * weight


def test_a_parametrization_added_later_is_picked_up(tmp_path: Path) -> None:
    """Parameters that a parametrization renames in mid-training are recorded under their new names."""

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
        if number == 2:
            parametrize.register_parametrization(model[0], "weight", Double())
        return plain_step(model, optimizer, number)

    watched = twins(lambda: nn.Sequential(nn.Linear(4, 3)), tmp_path, step)
    names = [set(of_kind(record, "Gradients")) for record in watched.records]
    assert names[0] == names[1] == {"0.weight", "0.bias"}
    assert names[2] == names[3] == {"0.parametrizations.weight.original", "0.bias"}


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: nn.Sequential(nn.TransformerEncoder(_encoder_layer(), 2)), 2),
        (lambda: nn.TransformerEncoder(_encoder_layer(), 2), 2),
    ],
    ids=["inside", "the encoder itself"],
)
def test_the_fused_path_of_the_transformer_stays_on_in_evaluation(
    make: Callable[[], nn.Module], layers: int, tmp_path: Path
) -> None:
    """Evaluation between sampled steps uses the fused kernel of `TransformerEncoderLayer` and gives equal outputs."""

    def count_fused(model: nn.Module) -> tuple[int, torch.Tensor]:
        model.eval()
        with torch.no_grad(), torch.profiler.profile() as profile:
            output = model(data(0, 6, 8)[None])
        model.train()
        events = [event.name for event in profile.events() or ()]
        return events.count("aten::_transformer_encoder_layer_fwd"), output

    def run(logdir: Path | None) -> list[tuple[int, torch.Tensor]]:
        torch.manual_seed(3)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if logdir is not None:
            instrument.watch(model, interval=1, logdir=logdir, strict=True)
        found = [count_fused(model)]
        for step in range(3):
            optimizer.zero_grad()
            model(data(step, 6, 8)[None]).square().mean().backward()
            found.append(count_fused(model))
            optimizer.step()
            found.append(count_fused(model))
        instrument.unwatch(model)
        return found

    with pytest.warns(instrument.InstrumentWarning, match="out_proj"):
        watched = run(tmp_path)
    bare = run(None)
    assert [count for count, _ in watched] == [count for count, _ in bare] == [layers] * 7
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(watched, bare, strict=True))


def test_a_layer_with_a_fused_path_as_the_whole_model_is_told(tmp_path: Path) -> None:
    """A layer watched by itself loses its fused path before sampled steps alone, says so, and trains the same."""
    model = _encoder_layer()
    with pytest.warns(instrument.InstrumentWarning):
        watched = twins(_encoder_layer, tmp_path, _step_of_tokens)
    assert any("refuses any hook on it" in notice for notice in watched.notices)
    with pytest.warns(instrument.InstrumentWarning), instrument.watch(model, interval=4, logdir=tmp_path / "few"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(8):
            model.eval()
            tokens = data(step, 6, 8)[None]
            with torch.no_grad(), torch.profiler.profile() as profile:
                output = model(tokens)
            names = [event.name for event in profile.events() or ()]
            assert ("aten::_transformer_encoder_layer_fwd" in names) == (step % 4 != 0)
            model.train()
            with torch.no_grad():
                expected = copy.deepcopy(model).eval()(tokens)
            assert torch.allclose(output, expected, atol=1e-6)
            _step_of_tokens(model, optimizer, step)


def _step_of_tokens(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = model(data(step, 6, 8)[None]).square().mean()
    loss.backward()
    optimizer.step()
    return loss


class Frozen(nn.Module):
    """A head that is trained on an encoder that is frozen and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2).requires_grad_(False)
        self.head = nn.Linear(8, 2)
        self.fused = 0
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        """Leave the encoder in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode with a mask, for which the fused path has zeros and the other has numbers."""
        mask = torch.tensor([[False, False, True]]).expand(2, 3)
        with torch.profiler.profile() as profile:
            encoded = self.encoder(x.reshape(2, 3, 8), src_key_padding_mask=mask)
        names = [event.name for event in profile.events() or ()]
        self.fused += names.count("aten::_transformer_encoder_layer_fwd")
        out: torch.Tensor = self.head(encoded)
        return out


@pytest.mark.parametrize("include", ["**", "encoder.layers.1.linear1"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fused_path_of_a_frozen_encoder_stays_on_in_training(include: str, tmp_path: Path) -> None:
    """A frozen encoder below a head that is trained keeps its fused path in sampled steps too; that is said once."""

    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(data(number, 6, 8)).square().mean()
        loss.backward()
        optimizer.step()
        assert model.fused == 2 * (number + 1)
        return loss

    with pytest.warns(instrument.InstrumentWarning, match="fused path of a frozen"):
        watched = twins(Frozen, tmp_path, step, optimizer=lambda m: torch.optim.SGD(m.head.parameters(), 0.1),
                        include=[include])  # fmt: skip
    assert len(watched.notices) == 1
    if include == "**":
        assert {"Frozen", "encoder", "head"} <= set(of_kind(watched.records[-1], "Activations"))


def test_double_backward_keeps_no_graph(tmp_path: Path) -> None:
    """A gradient penalty with `create_graph` trains bit-identically, and memory stays flat over many steps."""
    import gc

    def penalty(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        optimizer.zero_grad()
        x = data(step).requires_grad_()
        output = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        loss: torch.Tensor = output.mean() + gradient.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    watched = twins(make, tmp_path, penalty, steps=6)
    assert all("ActivationGradients/0" in record for record in watched.records)

    torch.manual_seed(3)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kinds = instrument.config.KINDS
    watcher = instrument.watch(model, kinds=kinds, interval=1, config={"history": 4}, logdir=tmp_path, strict=True)
    counts = []
    for step in range(150):
        penalty(model, optimizer, step)
        if step % 50 == 49:
            watcher.flush()  # until then copies of small tensors wait for the writer's thread
            gc.collect()
            counts.append(sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
    watcher.close()
