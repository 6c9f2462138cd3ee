"""Findings of real trainings: healthy ones are left alone, and each illness is named at the layer that has it."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everybody calls it

import instrument
from instrument.capture.names import Site
from instrument.config import KINDS
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.flight import FLIGHT_FILE, read_flight
from instrument.diagnose.report import Report
from instrument.record.runs import event_files

from .training import read_back

CLASSES = 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few hundred elements are no work for two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Convolutions(nn.Module):
    """Two convolutions with batch normalisation and a linear head, for images of 4 by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores of flattened images."""
        out: torch.Tensor = self.head(self.features(x.view(-1, 1, 4, 4)).flatten(1))
        return out


class Block(nn.Module):
    """A transformer block with attention under a causal mask."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens in, tokens out."""
        hidden = self.norm1(x)
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        x = x + self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A decoder of three blocks over twenty tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of the next token."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


def perceptron(nonlinearity: Callable[[], nn.Module] = nn.ReLU, hidden: int = 2) -> nn.Sequential:
    """Linear layers of 32 units: layers 0, 2, 4 ... are linear, the last is the head."""
    layers: list[nn.Module] = [nn.Linear(16, 32), nonlinearity()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(32, 32), nonlinearity()]
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


class Task:
    """Ten clusters in sixteen dimensions, or sequences that count on by one, two or three."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._centres = torch.randn(CLASSES, 16, generator=self._random)

    def points(self, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=self._random)
        return self._centres[labels] + 0.7 * torch.randn(count, 16, generator=self._random), labels

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, stride = (torch.randint(low, high, (16, 1), generator=self._random) for low, high in ((0, 20), (1, 4)))
        sequence = (first + stride * torch.arange(13)) % 20
        return sequence[:, :-1], sequence[:, 1:]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    logdir: Path,
    *,
    change: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, loss: loss,
    before_step: Callable[[int], None] = lambda step: None,
    **arguments: Any,
) -> instrument.Watcher:
    """Train on points, or on tokens, with everything watched; the watcher is closed already."""
    task = Task(seed=1)
    options: dict[str, Any] = {"kinds": KINDS, "interval": 50, "scalar_interval": 1, "strict": True, **arguments}
    with instrument.watch(model, logdir=logdir, **options) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            inputs, labels = task.tokens() if isinstance(model, Transformer) else task.points()
            scores = model(inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs)
            loss = change(step, F.cross_entropy(scores.float().flatten(0, -2), labels.flatten()))
            watcher.writer.add_scalar("train/loss", loss, step)
            loss.backward()
            before_step(step)
            optimizer.step()
    return watcher


def adamw(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def named(findings: tuple[Finding, ...], diagnostic: str) -> list[Finding]:
    return [finding for finding in findings if finding.diagnostic == diagnostic]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("make", "optimizer"),
    [(perceptron, adamw), (perceptron, sgd), (Convolutions, sgd), (Transformer, adamw)],
    ids=["mlp-adamw", "mlp-sgd", "cnn-sgd", "transformer-adamw"],
)
def test_a_healthy_training_is_left_alone(
    make: Callable[[], nn.Module], optimizer: Callable[[nn.Module], torch.optim.Optimizer], seed: int, tmp_path: Path
) -> None:
    """Three hundred steps of a healthy training, examined every third step with every kind, give no WARN at all."""
    torch.manual_seed(seed)
    model = make()
    watcher = train(model, optimizer(model), 300, tmp_path, scalar_interval=3)
    assert [str(finding) for finding in watcher.findings() if finding.level >= Level.WARN] == []
    assert not (tmp_path / FLIGHT_FILE).exists()


def test_a_healthy_training_in_float16_with_a_scaler_is_left_alone(tmp_path: Path) -> None:
    """Autocast to float16 under a gradient scaler, whose first scale overflows, gives no WARN at all."""
    model, task = perceptron(), Task(seed=1)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with instrument.watch(model, kinds=KINDS, interval=50, scalar_interval=1, logdir=tmp_path, strict=True) as watcher:
        for _ in range(150):
            optimizer.zero_grad()
            inputs, labels = task.points()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    halvings = round(24 - math.log2(scaler.get_scale()))
    assert halvings > 0
    skipped = named(watcher.findings(), "skipped_step")
    assert [(finding.level, finding.step) for finding in skipped] == [(Level.INFO, 0)]
    assert [str(finding) for finding in watcher.findings() if finding.level >= Level.WARN] == []


class Divides(nn.Module):
    """Passes its input on, and on one call divides zero by zero."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls, self.call = 0, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, or NaN."""
        self.calls += 1
        return x * 0.0 / 0.0 if self.calls == self.call else x * 1.0


class TestNonFinite:
    """A layer that turns NaN."""

    @staticmethod
    def training(tmp_path: Path, **arguments: Any) -> instrument.Watcher:
        model = perceptron()
        model.insert(2, Divides(call=41))
        with pytest.warns(instrument.InstrumentWarning, match="the output of 2 is the first to hold NaN"):
            return train(model, sgd(model), 70, tmp_path, **arguments)

    def test_the_layer_and_the_step_are_named_once(self, tmp_path: Path) -> None:
        """Of all that is NaN from step 40 on, the output of layer 2 is named, as critical, on the console too."""
        watcher = self.training(tmp_path)
        (found,) = named(watcher.findings(), "non_finite")
        assert (found.level, found.site, found.step) == (Level.CRIT, Site("activations", "2"), 40)
        assert found.value == 64 * 32

    def test_the_steps_before_are_kept_in_a_file(self, tmp_path: Path) -> None:
        """The file beside the event files has the accident, each reading up to it, and those that follow."""
        self.training(tmp_path, config={"non_finite_burst": 5})
        flight = read_flight(tmp_path)
        assert flight is not None
        accident, readings = flight
        assert (accident.reason, accident.step) == ("non_finite", 40)
        assert [reading.step for reading in readings] == list(range(46))
        assert readings[40].get("activations", "nan_count", "2") == 64 * 32
        assert readings[39].get("activations", "nan_count", "2") is None

    def test_each_following_step_is_sampled_and_then_no_more(self, tmp_path: Path) -> None:
        """With scalars every tenth step, the five steps after it was known are sampled, and then every tenth again."""
        model = perceptron()
        model.insert(2, Divides(call=21))
        task, optimizer = Task(seed=1), sgd(model)
        options: dict[str, Any] = {"interval": 50, "scalar_interval": 10, "config": {"non_finite_burst": 5}}
        with pytest.warns(instrument.InstrumentWarning, match="CRIT step 20"):
            watcher = instrument.watch(model, logdir=tmp_path, strict=True, **options)
            for _ in range(50):
                optimizer.zero_grad()
                inputs, labels = task.points()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                watcher.flush()  # what is found is found in the background; wait for it
        steps = [record.step for record in watcher.history]
        assert steps == [0, 10, 20, 22, 23, 24, 25, 26, 30, 40]
        watcher.close()

    def test_training_is_the_same_to_the_last_bit(self, tmp_path: Path) -> None:
        """With findings, a burst and a flight recorder, parameters and random state are those of a training without."""
        states = []
        for watched in (False, True):
            torch.manual_seed(3)
            model = perceptron()
            model.insert(1, nn.Dropout(0.2))
            model.insert(2, Divides(call=31))
            optimizer = adamw(model, lr=0.1)
            if watched:
                with pytest.warns(instrument.InstrumentWarning, match="CRIT step 30"):
                    train(model, optimizer, 50, tmp_path, scalar_interval=3)
            else:
                task = Task(seed=1)
                for _ in range(50):
                    optimizer.zero_grad()
                    inputs, labels = task.points()
                    F.cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
            states.append([*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()])
        assert any(bool(value.isnan().any()) for value in states[0][:-1])
        for plain, watched_value in zip(*states, strict=True):
            assert torch.equal(plain.nan_to_num(7.0), watched_value.nan_to_num(7.0))


def test_a_learning_rate_that_is_too_high_is_named(tmp_path: Path) -> None:
    """Steps of a good part of the weights, fifty in a row, are told for each matrix, and for no vector."""
    model = perceptron(nn.Tanh)
    # At 0.3 the smallest step is about the bound of 2 %, on this side or that by the processor; at 3 it is 3.8 %.
    found = named(train(model, adamw(model, lr=3.0), 60, tmp_path).findings(), "update_ratio")
    assert {finding.site for finding in found} == {Site("updates", f"{layer}.weight") for layer in (0, 2, 4)}
    assert all(finding.level == Level.WARN and finding.step == 49 for finding in found)


def test_a_gradient_that_vanishes_is_named_at_the_first_layer(tmp_path: Path) -> None:
    """In a network of eight sigmoid layers the gradient vanishes; its ReLU twin is left alone."""
    torch.manual_seed(0)
    deep = perceptron(nn.Sigmoid, hidden=8)
    (found, *_) = named(train(deep, sgd(deep), 20, tmp_path / "sigmoid").findings(), "vanishing_gradient")
    assert found.site == Site("gradients", "0.weight")
    twin = perceptron(nn.ReLU, hidden=8)
    for layer in twin:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    findings = train(twin, sgd(twin, lr=1e-3), 20, tmp_path / "relu").findings()
    assert [str(finding) for finding in findings if finding.level >= Level.WARN] == []


def test_an_initialisation_that_explodes_is_named_at_the_last_layer(tmp_path: Path) -> None:
    """Weights five times too large make activations grow from layer to layer, which is told where they end."""
    model = perceptron(hidden=6)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=5 * math.sqrt(2 / layer.in_features))
    findings = train(model, sgd(model, lr=0.0), 10, tmp_path).findings()
    (found,) = named(findings, "activation_scale")
    assert (found.level, found.site) == (Level.WARN, Site("activations", "12"))


class TwoHeads(nn.Module):
    """A network of which one head is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.used, self.unused = nn.Linear(16, 8), nn.Linear(8, CLASSES), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores by the one head."""
        out: torch.Tensor = self.used(self.body(x).relu())
        return out


@pytest.mark.filterwarnings("ignore:never called in the first sampled step")
def test_parameters_that_take_no_part_are_named(tmp_path: Path) -> None:
    """Unused ones lack a gradient, frozen ones are mentioned, and those whose learning rate is zero do not change."""
    model = TwoHeads()
    model.body.bias.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [model.used.bias], "lr": 0.0},
        {"params": [p for p in model.parameters() if p is not model.used.bias]},
    ]
    findings = train(model, torch.optim.SGD(groups, lr=0.1), 20, tmp_path).findings()
    assert {(f.diagnostic, f.level, f.site) for f in findings} == {
        ("no_gradient", Level.WARN, Site("gradients", "unused.weight")),
        ("no_gradient", Level.WARN, Site("gradients", "unused.bias")),
        ("frozen", Level.INFO, Site("parameters", "body.bias")),
        ("unchanged", Level.WARN, Site("updates", "used.bias")),
    }


def test_a_layer_of_which_nothing_comes_back_is_named(tmp_path: Path) -> None:
    """A ReLU that is off for every input cuts off what lies before it: gradients of nothing but zeros."""
    model = perceptron()
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    nn.init.constant_(linear.bias, -100.0)
    found = named(train(model, sgd(model), 20, tmp_path).findings(), "no_gradient")
    assert {finding.site.name for finding in found if finding.site is not None} >= {"0.weight", "0.bias"}
    assert "nothing but zeros" in found[0].sentence


def _scaled(scale: float, step: int, loss: torch.Tensor) -> torch.Tensor:
    return loss * scale


def test_a_gradient_that_underflows_float16_is_named(tmp_path: Path) -> None:
    """In a float16 network whose loss is tiny, gradients fall below the normal numbers; scaled up they do not."""
    for scale, told in ((1e-4, True), (100.0, False)):
        torch.manual_seed(0)
        model = perceptron().half()
        scaled = functools.partial(_scaled, scale)
        watcher = train(model, sgd(model, lr=1e-4), 10, tmp_path / str(scale), change=scaled)
        sites = {finding.site for finding in named(watcher.findings(), "underflow")}
        assert (Site("gradients", "0.weight") in sites) == told


def test_an_activation_near_the_end_of_float16_is_named(tmp_path: Path) -> None:
    """A layer whose output reaches beyond half of 65504 is told, its neighbours are not."""
    model = perceptron().half()
    linear = model[2]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(40_000.0)
        assert isinstance(model[4], nn.Linear)
        model[4].weight.mul_(1e-4)
    found = named(train(model, sgd(model, lr=0.0), 3, tmp_path, kinds=["activations"]).findings(), "near_overflow")
    assert [finding.site for finding in found] == [Site("activations", "2"), Site("activations", "3")]


def _silenced(units: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = perceptron()
    assert isinstance(model[0], nn.Linear)
    with torch.no_grad():
        model[0].bias[:units] = -100.0
    return model


@pytest.mark.parametrize(
    ("units", "told"),
    [(3, []), (5, [(Level.WARN, 100)]), (20, [(Level.WARN, 100), (Level.CRIT, 150)])],
)
def test_units_that_died_are_named(units: int, told: list[tuple[Level, int]], tmp_path: Path) -> None:
    """Of 32 units 3 are let pass, 5 are told after a window of 64 steps, 20 are critical after two, at that layer."""
    model = _silenced(units)
    found = named(train(model, sgd(model), 200, tmp_path).findings(), "dead_units")
    assert [(finding.level, finding.step) for finding in found] == told
    assert all(finding.site == Site("activations", "1") for finding in found)
    assert all(finding.value == units / 32 for finding in found)


@pytest.mark.parametrize(("factor", "told"), [(1, []), (40, [(Level.WARN, 100), (Level.CRIT, 150)])])
def test_a_saturated_layer_is_named(factor: float, told: list[tuple[Level, int]], tmp_path: Path) -> None:
    """A tanh behind weights forty times too large is told after a window, critical after two; its twins never are."""
    torch.manual_seed(0)
    model = perceptron(nn.Tanh)
    assert isinstance(model[2], nn.Linear)
    with torch.no_grad():
        model[2].weight.mul_(factor)
    found = named(train(model, sgd(model, lr=1e-4), 200, tmp_path).findings(), "saturated_units")
    assert [(finding.level, finding.step) for finding in found] == told
    assert all(finding.site == Site("activations", "3") for finding in found)


def test_a_gradient_that_explodes_is_named_at_the_first_layer(tmp_path: Path) -> None:
    """Through twelve tanh layers with weights five times too large it grows on its way back; true to scale not."""
    for gain, told in ((5.0, [Site("gradients", "0.weight")]), (1.0, [])):
        torch.manual_seed(0)
        model = perceptron(nn.Tanh, hidden=12)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
        found = named(train(model, sgd(model, lr=1e-6), 10, tmp_path / str(gain)).findings(), "exploding_gradient")
        assert [finding.site for finding in found] == told
        assert all(finding.level == Level.WARN for finding in found)


class Massive(nn.Module):
    """Passes 16,384 values on, and makes one of them five thousand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input but for its first value."""
        is_first = torch.zeros_like(x, dtype=torch.bool)
        is_first[0, 0] = True
        return x.masked_fill(is_first, 5000.0)


def test_a_massive_activation_is_mentioned(tmp_path: Path) -> None:
    """One value that is more than a hundred times the root mean square of its tensor is told as INFO, where it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), Massive(), nn.LayerNorm(256), nn.Linear(256, CLASSES))
    watcher = train(model, sgd(model, lr=1e-3), 5, tmp_path, kinds=["activations"])
    (found,) = named(watcher.findings(), "outliers")
    assert (found.level, found.site, found.step) == (Level.INFO, Site("activations", "2"), 0)
    # The root of the mean of the squares of one such value among 16,384, and of others that are small beside it.
    assert found.value == pytest.approx(128.0, rel=1e-3)


def test_gradients_that_are_always_clipped_are_told(tmp_path: Path) -> None:
    """With a limit far below the norm of the gradients, clipping is told as INFO."""
    model = perceptron()

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    watcher = train(model, sgd(model), 30, tmp_path, before_step=clip)
    (found,) = named(watcher.findings(), "clipped")
    assert (found.level, found.value) == (Level.INFO, 1.0)


def test_a_spike_is_told_and_recorded(tmp_path: Path) -> None:
    """A loss a thousand times too large on one step is a spike of loss and gradient norm, on that very step."""
    model = perceptron()
    watcher = train(
        model, sgd(model, lr=1e-3), 60, tmp_path, change=lambda step, loss: loss * 1000 if step == 50 else loss
    )
    spikes = [finding for finding in watcher.findings() if finding.diagnostic.endswith("spike")]
    assert {(f.diagnostic, f.step) for f in spikes} == {("loss_spike", 50), ("gradient_spike", 50)}
    flight = read_flight(tmp_path)
    assert flight is not None
    assert flight[0].step == 50


def test_a_run_is_written_one_step_after_another(tmp_path: Path) -> None:
    """With records that pile up behind a slow disk, no event of ours comes after one of a later step."""
    model, writer = perceptron(), instrument.SummaryWriter(tmp_path)
    is_full = threading.Event()
    task, optimizer = Task(seed=1), sgd(model)
    with instrument.watch(model, writer=writer, interval=8, scalar_interval=1) as watcher:
        writer.add_built(lambda: [(b"",)] * (not is_full.wait(30)), 0)  # the disk
        for _ in range(40):
            optimizer.zero_grad()
            inputs, labels = task.points()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        is_full.set()
        assert len(watcher.history) == 40
    events = (event for path in event_files(tmp_path) for event in EventFileLoader(str(path)).Load())
    steps = [event.step for event in events if event.summary.value]
    assert len(set(steps)) >= 40
    assert steps == sorted(steps)


def test_a_finished_run_tells_what_the_live_watch_told(tmp_path: Path) -> None:
    """The report of a run has the findings, the table, the notices and the accident of the live one."""
    watcher = TestNonFinite.training(tmp_path, config={"non_finite_burst": 3, "spike_window": 16})
    live, read = watcher.report(), Report.of_run(tmp_path)
    assert [(f.level, f.diagnostic, f.site, f.step, f.unit) for f in live.findings] == [
        (f.level, f.diagnostic, f.site, f.step, f.unit) for f in read.findings
    ]
    assert [(row.layer, row.flags) for row in live.health] == [(row.layer, row.flags) for row in read.health]
    assert live.notices == read.notices
    assert live.accident == read.accident
    assert [(row.kind, row.name, row.step) for row in live.rows] == [
        (row.kind, row.name, row.step) for row in read.rows
    ]
    assert "CRIT non_finite" in str(read)
    assert "passes on NaN" in str(read)
    _, scalars = read_back(tmp_path)
    assert set(scalars["Updates.log10_ratio/_guide"].values()) == {-3.0}
