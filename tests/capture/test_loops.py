"""Loop shapes: in each, the steps counted and the gradients recorded are the true ones.

Every loop computes its own truth: how many updates were made, and which gradient each update used.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import instrument
from instrument.capture.hooks.objects import ForwardPass

from ..training import batch, mlp

Watch = Callable[..., instrument.Watcher]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Watch with every step sampled, faults raised, and the watch closed at the end."""
    made: list[instrument.Watcher] = []

    def start(model: nn.Module, **arguments: Any) -> instrument.Watcher:
        arguments = {
            "interval": 1,
            "kinds": ("activations", "activation_gradients", "parameters", "gradients"),
            **arguments,
        }
        watcher = instrument.watch(model, logdir=tmp_path / str(len(made)), strict=True, **arguments)
        made.append(watcher)
        return watcher

    yield start
    for watcher in made:
        watcher.close()


def steps(watcher: instrument.Watcher) -> list[int]:
    return [record.step for record in watcher.history]


def gradient_norms(watcher: instrument.Watcher, name: str) -> list[float]:
    return [record[f"Gradients/{name}"].l2 for record in watcher.history if f"Gradients/{name}" in record]


def norm(parameter: Any) -> float:
    return float(parameter.grad.norm())


def sgd(*modules: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=lr)


def test_plain(watch: Watch) -> None:
    """A plain loop of six steps: six records, numbered from 0, each with the gradient and the output of its step."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(6):
        optimizer.zero_grad()
        output = model(batch(step))
        output.square().mean().backward()
        truth.append((norm(model[0].weight), float(output.detach().norm())))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3, 4, 5]
    assert gradient_norms(watcher, "0.weight") == pytest.approx([gradient for gradient, _ in truth], rel=1e-6)
    outputs = [record["Activations/2"].l2 for record in watcher.history]
    assert outputs == pytest.approx([output for _, output in truth], rel=1e-6)
    assert all(record["Activations/2"].count == 16 * 2 for record in watcher.history)


def test_accumulation(watch: Watch) -> None:
    """Four micro-batches a step: one record a step, with the accumulated gradient and all activations."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(5):
        for micro in range(4):
            model(batch(4 * step + micro)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
        optimizer.zero_grad()
    assert steps(watcher) == [0, 1, 2, 3, 4]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Activations/0"].count == 4 * 16 * 8 for record in watcher.history)


def test_evaluation_and_rollouts_between(watch: Watch) -> None:
    """Evaluation, with and without `no_grad` and `eval`, and rollouts are not steps and not recorded."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(4):
        with torch.no_grad():
            for _ in range(6):  # rollouts in train mode
                model(batch(step, size=100))
        model.eval()
        with torch.inference_mode():
            model(batch(step, size=50))
        model(batch(step, size=50))  # evaluation whose author forgot no_grad
        model.train()
        model(batch(step, size=70))  # the same in train mode: never backpropagated
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
        with torch.no_grad():
            model(batch(step, size=30))
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/0"].count for record in watcher.history] == [16 * 8] * 4


@pytest.mark.parametrize("by_parts", [False, True])
def test_training_in_evaluation_mode(by_parts: bool, watch: Watch) -> None:
    """A model that is trained in evaluation mode, as `from_pretrained` leaves it, is recorded; evaluating it is not."""
    model = mlp().eval()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(4):
        model(batch(step, size=50))  # without `no_grad`
        optimizer.zero_grad()
        for micro in range(2):
            x = batch(2 * step + micro)
            for part in model if by_parts else [model]:
                x = part(x)
            x.mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    for section in ("Activations", "ActivationGradients"):
        assert [record[f"{section}/0"].count for record in watcher.history] == [2 * 16 * 8] * 4
    assert watcher.notices == ()


def living_passes() -> int:
    gc.collect()
    return sum(type(thing) is ForwardPass for thing in gc.get_objects())


@pytest.mark.parametrize("gradients", [False, True])
def test_rollouts_without_end_take_no_memory(gradients: bool, watch: Watch) -> None:
    """A thousand rollouts in train mode, with `no_grad` or with graphs that are thrown away, take no memory."""
    model = mlp()
    optimizer, watcher = sgd(model), watch(model)
    for step in range(3):
        for _ in range(500 * (step > 0)):
            with torch.set_grad_enabled(gradients):
                model(batch(step, size=3))
        # Some of the latest are kept until it is looked again; each module called by itself counts as one.
        assert living_passes() < 150
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        optimizer.step()
    assert steps(watcher) == [0, 1, 2]
    assert [record["Activations/0"].count for record in watcher.history] == [16 * 8] * 3


def test_a_backward_through_hundreds_of_passes_counts_each(watch: Watch) -> None:
    """REINFORCE: three hundred passes, then one backward through all of them; each is counted, with its gradient."""
    model = nn.Linear(4, 2)
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(2):
        optimizer.zero_grad()
        moves = [model(batch(300 * step + move, size=1)).log_softmax(1)[0, 0] for move in range(300)]
        torch.stack(moves).sum().backward()
        truth.append(norm(model.weight))
        optimizer.step()
    assert steps(watcher) == [0, 1]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/Linear"].count for record in watcher.history] == [300 * 2] * 2
    assert [record["ActivationGradients/Linear"].count for record in watcher.history] == [300 * 2] * 2


class Gan(nn.Module):
    """A container of two networks; it is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.G = nn.Linear(2, 4)
        self.D = nn.Linear(4, 1)


def gan_step(gan: Gan, g: torch.optim.Optimizer, d: torch.optim.Optimizer, critics: int = 1) -> tuple[float, float]:
    """One iteration; returns the norms of the gradients that D and then G were stepped with."""
    for _ in range(critics):
        d.zero_grad()
        loss = gan.D(gan.G(torch.randn(8, 2)).detach()).mean() - gan.D(torch.randn(8, 4)).mean()
        loss.backward()
        of_d = norm(gan.D.weight)
        d.step()
    g.zero_grad()
    (-gan.D(gan.G(torch.randn(8, 2))).mean() * 3).backward()
    of_g = norm(gan.G.weight)
    g.step()
    return of_d, of_g


def test_gan_together(watch: Watch) -> None:
    """Two optimizers, one step each: N steps and not 2N, each network with the gradient of its own step."""
    gan = Gan()
    g, d, watcher = sgd(gan.G), sgd(gan.D), watch(gan)
    truth = [gan_step(gan, g, d) for _ in range(6)]
    assert watcher.current_step == 6
    assert steps(watcher) == [0, 1, 2, 3, 4, 5]
    assert gradient_norms(watcher, "D.weight") == pytest.approx([of_d for of_d, _ in truth], rel=1e-6)
    assert gradient_norms(watcher, "G.weight") == pytest.approx([of_g for _, of_g in truth], rel=1e-6)
    # The container is never called, so that its networks are followed from the second step on.
    assert all({"Activations/G", "Activations/D"} <= set(record) for record in list(watcher.history)[1:])


def test_a_root_that_is_called_to_evaluate_alone(watch: Watch) -> None:
    """A model whose parts are called to train, and itself only to evaluate, is followed on every later step."""

    class Parts(nn.Sequential):
        pass

    model = Parts(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = sgd(model)
    watcher = watch(model)
    for _ in range(4):
        optimizer.zero_grad()
        model[1](model[0](torch.randn(5, 2))).sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(torch.randn(9, 2))
        model.train()
    counts = [
        {tag: s.count for tag, s in record.items() if tag.startswith("Activations/")} for record in watcher.history
    ]
    assert counts[1:] == [{"Activations/0": 15, "Activations/1": 5}] * 3


def test_gan_alone(watch: Watch) -> None:
    """Each network watched by itself counts its own optimizer's steps, also when it is called through a GAN."""
    gan = Gan()
    g, d = sgd(gan.G), sgd(gan.D)
    of_g, of_d = watch(gan.G), watch(gan.D)
    truth = [gan_step(gan, g, d) for _ in range(5)]
    assert (of_g.current_step, of_d.current_step) == (5, 5)
    assert gradient_norms(of_d, "weight") == pytest.approx([norm for norm, _ in truth], rel=1e-6)
    assert gradient_norms(of_g, "weight") == pytest.approx([norm for _, norm in truth], rel=1e-6)


def test_critics(watch: Watch) -> None:
    """Five critic steps a generator step: D counts its own, G its own, and both together the faster one."""
    gan = Gan()
    g, d = sgd(gan.G), sgd(gan.D)
    of_g, of_d, of_both = watch(gan.G), watch(gan.D), watch(gan)
    truth = [gan_step(gan, g, d, critics=5) for _ in range(4)]
    assert (of_g.current_step, of_d.current_step, of_both.current_step) == (4, 20, 20)
    assert steps(of_g) == [0, 1, 2, 3]
    assert gradient_norms(of_g, "weight") == pytest.approx([norm for _, norm in truth], rel=1e-6)
    with_g = [record.step for record in of_both.history if "Gradients/G.weight" in record]
    assert with_g == [4, 9, 14, 19]


def test_two_optimizers_on_one_model(watch: Watch) -> None:
    """One optimizer for matrices and one for the rest, as Muon beside AdamW, make N steps together."""
    model = mlp()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2])
    watcher, truth = watch(model), []
    for step in range(5):
        matrices.zero_grad()
        rest.zero_grad()
        model(batch(step)).mean().backward()
        truth.append((norm(model[0].weight), norm(model[0].bias)))
        matrices.step()
        rest.step()
    assert steps(watcher) == [0, 1, 2, 3, 4]
    assert gradient_norms(watcher, "0.weight") == pytest.approx([w for w, _ in truth], rel=1e-6)
    assert gradient_norms(watcher, "0.bias") == pytest.approx([b for _, b in truth], rel=1e-6)


def test_optimizer_in_backward(watch: Watch) -> None:
    """One optimizer a parameter, stepped inside backward: N steps, and every gradient is there."""
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    truth: list[float] = []

    def step_at_once(parameter: torch.Tensor) -> None:
        if parameter is model[0].weight:
            truth.append(parameter.grad.norm().item())  # type: ignore[union-attr]
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    watcher = watch(model)
    for step in range(5):
        model(batch(step)).mean().backward()
    assert watcher.current_step == 5
    assert steps(watcher) == [0, 1, 2, 3, 4]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    for record in watcher.history:
        assert {f"Gradients/{name}" for name, _ in model.named_parameters()} <= set(record)
        assert {"Activations/0", "ActivationGradients/0"} <= set(record)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None, watch: Watch) -> None:
    """LBFGS evaluates its closure several times a step: one record a step, gradients of the last evaluation."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)
    watcher, truth, evaluations = watch(model), [], 0

    def closure() -> Any:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(4):
        optimizer.step(closure)
        truth.append(norm(model.weight))
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)
    assert sum(record["Activations/Linear"].count for record in watcher.history) == evaluations * 16 * 2


def test_sgd_with_a_closure(watch: Watch) -> None:
    """Any optimizer may be given a closure: one record a step, with the gradient that the closure made."""
    model = nn.Linear(4, 2)
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(4):

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            loss.backward()
            truth.append(norm(model.weight))
            return loss.detach()

        optimizer.step(closure)
    assert len(truth) == 4
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/Linear"].count for record in watcher.history] == [16 * 2] * 4
    assert [record["ActivationGradients/Linear"].count for record in watcher.history] == [16 * 2] * 4


def test_a_closure_that_raises(watch: Watch) -> None:
    """A step whose closure raises after its backward is none, and what it computed is not in the next record."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    watcher = watch(model)
    evaluations, counted, truth = 0, [], []

    def closure() -> Any:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        if fails and evaluations == 2:
            raise RuntimeError("deliberate")
        return loss.detach()

    for step in range(5):
        fails, evaluations = step in (1, 2), 0
        try:
            optimizer.step(closure)
        except RuntimeError:
            continue
        counted.append(evaluations)
        truth.append(norm(model.weight))
    assert steps(watcher) == [0, 1, 2]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/Linear"].count for record in watcher.history] == [16 * 2 * n for n in counted]


class Chatty(torch.optim.SGD):
    """A subclass that calls the step of its base."""

    def step(self, closure: Any = None) -> Any:
        """Step as the base does."""
        return super().step(closure)


def test_subclass_that_calls_super(watch: Watch) -> None:
    """`super().step()` fires the hooks twice once the base class was used itself: it is one step all the same."""
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    model = mlp()
    optimizer, watcher, truth = Chatty(model.parameters(), lr=0.1), watch(model), []
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Gradients/0.weight"].count == 32 for record in watcher.history)


class Lookahead(torch.optim.Optimizer):
    """A wrapper that steps another optimizer and is an optimizer itself."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        """Step the optimizer inside."""
        self.base.step()


class Passing(Lookahead):
    """A wrapper that hands its closure on."""

    def step(self, closure: Any = None) -> Any:
        """Step the optimizer inside with the closure."""
        return self.base.step(closure)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: climbs first, then steps the optimizer inside."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb along the gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=0.01)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Go back and step with the gradient from there."""
        self.base.step()

    def step(self, closure: Any = None) -> Any:
        """Both steps around a closure."""
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def test_lookahead(watch: Watch) -> None:
    """A wrapper and what it wraps make one step together."""
    model = mlp()
    optimizer, watcher, truth = Lookahead(sgd(model)), watch(model), []
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Gradients/0.weight"].count == 32 for record in watcher.history)


def test_a_wrapper_that_hands_a_closure_on(watch: Watch) -> None:
    """A closure that goes through a wrapper's step into the one inside makes one step, with its gradient once."""
    model = nn.Linear(4, 2)
    optimizer, watcher, truth = Passing(sgd(model)), watch(model), []
    for step in range(4):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            truth.append(norm(model.weight))

        optimizer.step(closure)
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Gradients/weight"].count == 8 for record in watcher.history)


def test_sam(watch: Watch) -> None:
    """SAM's two passes are one step, with the gradient of the second."""
    model = nn.Linear(4, 2)
    optimizer, watcher, truth = Sam(sgd(model)), watch(model), []
    for step in range(4):
        model(batch(step)).square().mean().backward()
        optimizer.first_step()
        model(batch(step)).square().mean().backward()
        truth.append(norm(model.weight))
        optimizer.second_step()
        optimizer.zero_grad()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)


def test_sam_with_a_closure(watch: Watch) -> None:
    """Where SAM's own `step` takes a closure for its second pass, the gradient is that of the second pass too."""
    model = nn.Linear(4, 2)
    optimizer, watcher, truth = Sam(sgd(model)), watch(model), []

    for step in range(4):

        def closure(step: int = step) -> None:
            model(batch(step)).square().mean().backward()
            truth.append(norm(model.weight))

        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth[1::2], rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_with_an_overflow(fused: bool, watch: Watch) -> None:
    """Under a gradient scaler gradients are reported unscaled, and an overflow neither crashes nor shifts them."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watcher, truth = watch(model), []
    for step in range(5):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        if step == 2:
            model.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        else:
            truth.append(norm(model.weight) / scale)
        scaler.step(optimizer)
        scaler.update()
    recorded = [r["Gradients/weight"].l2 for r in watcher.history if r["Gradients/weight"].inf_count == 0]
    assert recorded == pytest.approx(truth, rel=1e-5)
    # Unfused, the optimizer is not called at an overflow: no update, no step.
    assert watcher.current_step == (5 if fused else 4)


def test_a_skipped_nan_step(watch: Watch) -> None:
    """A step that the loop itself skips, because its loss is NaN, is none."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(6):
        optimizer.zero_grad()
        loss = model(batch(step)).mean() * (float("nan") if step == 3 else 1.0)
        loss.backward()
        if torch.isfinite(loss):
            truth.append(norm(model[0].weight))
            optimizer.step()
    assert watcher.current_step == len(truth) == 5
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Activations/0"].count == 16 * 8 for record in watcher.history)
    assert all(record["ActivationGradients/0"].nan_count == 0 for record in watcher.history)


@pytest.mark.parametrize("clears", ["none before", "zeros before", "none after", "zeros after"])
@pytest.mark.parametrize("clips", [False, True])
def test_hand_written_updates(clips: bool, clears: str, watch: Watch) -> None:
    """An update without an optimizer is seen at the next forward pass, its gradients however the loop clears them."""
    model = nn.Linear(4, 2)
    watcher, truth = watch(model), []

    def clear(when: str) -> None:
        if clears.endswith(when):
            model.zero_grad(set_to_none=clears.startswith("none"))

    for step in range(5):
        clear("before")
        for micro in range(2):
            model(batch(2 * step + micro)).square().mean().backward()
        truth.append(norm(model.weight))
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
        if step < 4:
            clear("after")
    assert watcher.current_step == 5
    watcher.close()
    assert steps(watcher) == [0, 1, 2, 3, 4]
    # Clipped gradients are seen where they are left: cleared, they are those that the last backward pass left.
    if clips:
        assert watcher.history[-1]["Gradients/weight"].l2 < 0.1
        truth = truth[:-1]
    assert gradient_norms(watcher, "weight")[: len(truth)] == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/Linear"].count for record in watcher.history] == [2 * 16 * 2] * 5


def test_gradients_that_were_cleared_are_no_zeros(watch: Watch) -> None:
    """After `zero_grad(set_to_none=False)` the last step, which was not sampled, has no gradient rather than zeros."""
    model = mlp()
    optimizer, watcher = sgd(model), watch(model, interval=10, scalar_interval=10)
    for step in range(3):
        model(batch(step)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    watcher.close()
    assert steps(watcher) == [0, 2]
    assert [len(gradient_norms(watcher, "0.weight"))] == [1]
    assert all("Parameters/0.weight" in record for record in watcher.history)


def test_updates_through_data_are_told_and_counted_by_hand(watch: Watch) -> None:
    """`p.data -= ...` leaves no trace: that is said once, and `step()` by hand works."""
    model = nn.Linear(4, 2)
    watcher = watch(model)
    with pytest.warns(instrument.InstrumentWarning, match="no optimizer step was seen") as caught:
        for step in range(8):
            model(batch(step)).square().mean().backward()
            for p in model.parameters():
                p.data -= 0.1 * p.grad  # type: ignore[operator]
                p.grad = None
    assert len(caught) == 1
    assert watcher.current_step == 0
    truth = []
    for step in range(4):
        model(batch(step)).square().mean().backward()
        truth.append(norm(model.weight))
        for p in model.parameters():
            p.data -= 0.1 * p.grad  # type: ignore[operator]
        if step % 2:
            model.zero_grad()
        watcher.step()
        model.zero_grad()
    assert watcher.current_step == 4
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "weight") == pytest.approx(truth, rel=1e-6)


def test_master_weights(watch: Watch) -> None:
    """An optimizer over float32 copies of the weights is taken for the clock."""
    model = nn.Linear(4, 2).to(torch.bfloat16)
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer, watcher, truth = torch.optim.SGD(masters, lr=0.1), watch(model), []
    for step in range(6):
        model.zero_grad()
        model(batch(step, dtype=torch.bfloat16)).square().mean().backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()  # type: ignore[union-attr]
        truth.append(norm(masters[0]))
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
    assert watcher.current_step == 6
    assert steps(watcher)[-4:] == [2, 3, 4, 5]
    assert gradient_norms(watcher, "weight")[-4:] == pytest.approx(truth[-4:], rel=1e-6)


class Checkpointed(nn.Module):
    """A model whose body is computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inp = nn.Linear(4, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the body under activation checkpointing."""
        y = checkpoint(self.body, self.inp(x), use_reentrant=self.reentrant)
        out: torch.Tensor = self.out(y)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_child(reentrant: bool, watch: Watch) -> None:
    """Under activation checkpointing a module counts once forward and once backward."""
    model = Checkpointed(reentrant)
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model.body[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2]
    assert gradient_norms(watcher, "body.0.weight") == pytest.approx(truth, rel=1e-6)
    for record in watcher.history:
        assert record["Activations/body.0"].count == 16 * 8
        assert record["ActivationGradients/body.0"].count == 16 * 8
        assert record["Gradients/body.0.weight"].count == 64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_root(reentrant: bool, watch: Watch) -> None:
    """The root itself under activation checkpointing is one forward pass a step."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(3):
        optimizer.zero_grad()
        checkpoint(model, batch(step).requires_grad_(), use_reentrant=reentrant).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    for record in watcher.history:
        assert record["Activations/0"].count == 16 * 8
        assert record["ActivationGradients/0"].count == 16 * 8


def test_gradient_penalty(watch: Watch) -> None:
    """A double backward makes one step, with the gradient that the optimizer uses."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(4):
        optimizer.zero_grad()
        x = batch(step).requires_grad_()
        output = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (output.mean() + gradient.square().mean()).backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)


def test_forward_called_directly(watch: Watch) -> None:
    """`model.forward(x)` passes the root's hooks by: steps and gradients are right, its layers follow a step late."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    for step in range(4):
        optimizer.zero_grad()
        model.forward(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert [record["Activations/0"].count for record in list(watcher.history)[1:]] == [16 * 8] * 3
    assert ["Activations/0" in record for record in watcher.history] == [False, True, True, True]


def test_progressive_unfreezing(watch: Watch) -> None:
    """A layer that is frozen has values and no gradients; unfrozen, its gradients appear without another watch."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer, watcher, truth = sgd(model[3]), watch(model), []
    for step in range(6):
        if step == 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append([norm(layer.weight) for layer in (model[0], model[3]) if layer.weight.grad is not None])
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3, 4, 5]
    assert gradient_norms(watcher, "3.weight") == pytest.approx([norms[-1] for norms in truth], rel=1e-6)
    assert gradient_norms(watcher, "0.weight") == pytest.approx([norms[0] for norms in truth[3:]], rel=1e-6)
    assert ["Gradients/0.weight" in record for record in watcher.history] == [False] * 3 + [True] * 3
    assert all("Parameters/0.weight" in record for record in watcher.history)


def test_optimizer_made_anew(watch: Watch) -> None:
    """A new optimizer for the same parameters, or for more, goes on counting where the old one stood."""
    model = mlp()
    watcher, truth = watch(model), []
    optimizer: torch.optim.Optimizer = sgd(model[3])
    for step in range(9):
        if step == 3:
            optimizer = torch.optim.Adam(model[3].parameters())
        if step == 6:
            optimizer = torch.optim.AdamW(model.parameters())
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model[3].weight))
        optimizer.step()
    assert watcher.current_step == 9
    assert steps(watcher) == list(range(9))
    assert gradient_norms(watcher, "3.weight") == pytest.approx(truth, rel=1e-6)
    # Only what an optimizer owns is a gradient that is used.
    assert ["Gradients/0.weight" in record for record in watcher.history] == [False] * 6 + [True] * 3


def test_ema(watch: Watch) -> None:
    """An averaged copy, updated and evaluated after each step, is neither a step nor recorded."""
    model = mlp()
    optimizer, watcher, truth = sgd(model), watch(model), []
    averaged = torch.optim.swa_utils.AveragedModel(model)
    second = copy.deepcopy(model)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
        averaged.update_parameters(model)
        averaged(batch(step))
        second(batch(step)).mean().backward()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Activations/0"].count == 16 * 8 for record in watcher.history)


def test_scheduler_with_a_compiled_model(watch: Watch) -> None:
    """A learning rate scheduler and a compiled model change nothing in the count."""
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    watcher, truth = watch(compiled, compiled="outside"), []
    for step in range(4):
        optimizer.zero_grad()
        compiled(batch(step)).mean().backward()
        truth.append(norm(model[0].weight))
        optimizer.step()
        scheduler.step()
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)


def test_actor_and_critic_in_one_adam(watch: Watch) -> None:
    """Two networks in one optimizer: each, watched by itself, counts its steps and has its own gradients."""
    actor, critic = nn.Linear(4, 2), nn.Linear(4, 1)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    of_actor, of_critic, truth = watch(actor), watch(critic), []
    for step in range(4):
        optimizer.zero_grad()
        (actor(batch(step)).mean() + 2 * critic(batch(step)).mean()).backward()
        truth.append((norm(actor.weight), norm(critic.weight)))
        optimizer.step()
    assert steps(of_actor) == steps(of_critic) == [0, 1, 2, 3]
    assert gradient_norms(of_actor, "weight") == pytest.approx([a for a, _ in truth], rel=1e-6)
    assert gradient_norms(of_critic, "weight") == pytest.approx([c for _, c in truth], rel=1e-6)


def test_a_step_that_raises(watch: Watch) -> None:
    """An optimizer step that raises and is caught is none; the next ones count, each gradient once."""

    class Moody(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    model = mlp()
    optimizer, watcher, truth = Moody(model.parameters(), lr=0.1), watch(model), []
    for step in range(6):
        optimizer.fails = step in (1, 2)
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        gradient = norm(model[0].weight)
        try:
            optimizer.step()
        except RuntimeError:
            continue
        truth.append(gradient)
    assert watcher.current_step == 4
    assert steps(watcher) == [0, 1, 2, 3]
    assert gradient_norms(watcher, "0.weight") == pytest.approx(truth, rel=1e-6)
    assert all(record["Gradients/0.weight"].count == 32 for record in watcher.history)
    assert all(record["Activations/0"].count == 16 * 8 for record in watcher.history)


def test_another_models_optimizer_is_none_of_ours(watch: Watch) -> None:
    """An optimizer of other parameters, stepped before and between, counts for nothing."""
    model, probe = mlp(), nn.Linear(4, 1)
    optimizer, other, watcher = sgd(model), sgd(probe), watch(model)
    for step in range(4):
        for _ in range(3):
            other.zero_grad()
            probe(batch(step)).mean().backward()
            other.step()
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        optimizer.step()
    assert steps(watcher) == [0, 1, 2, 3]


def test_the_optimizer_given_is_the_only_clock(watch: Watch) -> None:
    """With `optimizer=` another optimizer of the same parameters does not count."""
    model = mlp()
    pre, main = sgd(model), sgd(model)
    watcher = watch(model, optimizer=main)
    for step in range(6):
        optimizer = pre if step % 2 else main
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        optimizer.step()
    assert watcher.current_step == 3


def test_steps_by_hand(watch: Watch) -> None:
    """After `step()` nothing is inferred; numbers of the loop's own are taken, and never go back."""
    model = mlp()
    optimizer, watcher = sgd(model), watch(model)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        optimizer.step()
        watcher.step()
    assert watcher.current_step == 3
    for step in (10, 20):
        optimizer.zero_grad()
        model(batch(step)).mean().backward()
        optimizer.step()
        watcher.step(step)
    assert steps(watcher) == [0, 1, 2, 10, 20]
    assert watcher.current_step == 21
    with pytest.warns(instrument.InstrumentWarning, match=r"step\(5\) was called after step 20"):
        watcher.step(5)
    assert watcher.current_step == 22
    assert all("Gradients/0.weight" in record for record in list(watcher.history)[:5])
    for bad in (-1, 1.5, True, "3"):
        with pytest.raises(instrument.ConfigError, match="step: found"):
            watcher.step(bad)  # type: ignore[arg-type]
