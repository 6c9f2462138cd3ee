"""Units from end to end: trained networks whose dead units are known, and what `dead_units()` says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import instrument
from instrument.capture.names import Site
from instrument.diagnose.units import UnitStatus
from instrument.errors import ConfigError, InstrumentWarning, SelectionError
from instrument.measure.units import UnitTally
from instrument.record.buffer import Buffer
from instrument.record.documents import UNITS_TAG
from instrument.record.reading import read_steps
from instrument.watcher.rows import RowTallies

from .training import read_back

SMALL = {"dead_window_samples": 32, "dead_window_batches": 4}
"""A window that six batches of 16 fill."""


def data(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    directory: Path,
    shape: tuple[int, ...] = (16, 4),
    steps: int = 6,
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x),
    **arguments: Any,
) -> dict[str, UnitStatus]:
    """Train on noise with every step sampled and faults raised; what is known of the units then."""
    arguments = {"config": SMALL, "interval": 1, "strict": True, **arguments}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with instrument.watch(model, logdir=directory, **arguments) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            forward(model, data(step, *shape)).square().mean().backward()
            optimizer.step()
        return watcher.dead_units()


def kill(layer: nn.Linear | nn.Conv2d, *units: int, bias: float = -100.0) -> None:
    """Give units a bias that no input overcomes."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias[list(units)] = bias


def mlp(activation: nn.Module, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), activation, nn.Linear(width, 2))


# The network of known dead units: 20,000 samples of ten classes in 200 clusters, two hidden layers of 256, 800 steps.


class Classifier(nn.Module):
    """Two hidden layers with ReLU as modules or as functions."""

    def __init__(self, features: int, has_modules: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 256)
        self.fc2 = nn.Linear(256, 256)
        self.head = nn.Linear(256, 10)
        self.act1: Callable[[torch.Tensor], torch.Tensor] = nn.ReLU() if has_modules else functional.relu
        self.act2: Callable[[torch.Tensor], torch.Tensor] = nn.ReLU() if has_modules else functional.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.act2(self.fc2(self.act1(self.fc1(x)))))
        return out


def clusters(count: int, mean: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of shape (20000, count) and classes; features that are not centred silence units by the hundred."""
    generator = torch.Generator().manual_seed(0)
    centres = mean + torch.randn(200, count, generator=generator)
    classes = torch.randint(10, (200,), generator=generator)
    chosen = torch.randint(200, (20_000,), generator=generator)
    return centres[chosen] + noise * torch.randn(20_000, count, generator=generator), classes[chosen]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small layers train faster on one thread, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("rate", "task", "low", "high", "start", "every"),
    [
        (5e-3, (20, 0.0, 0.7), 0.05, 0.09, 700, 1),
        (2e-2, (20, 0.0, 0.7), 0.30, 0.42, 700, 1),
        (2e-2, (64, 1.2, 0.2), 0.52, 0.63, 700, 1),
        (2e-2, (64, 1.2, 0.2), 0.52, 0.63, 0, 10),
    ],
)
def test_precision_and_recall_on_a_relu_network(
    tmp_path: Path, rate: float, task: tuple[int, float, float], low: float, high: float, start: int, every: int
) -> None:
    """Of units called dead 0.9 are, and of dead units 0.9 are found, by activations and by gradient rows alike.

    The truth is that a unit fires on none of all 20,000 samples with the weights of the end. Three seeds are pooled.
    """
    features, classes = clusters(*task)
    by_names: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for seed in range(3):
        weights = []
        for names in (("act1", "act2"), ("fc1", "fc2")):
            torch.manual_seed(seed)
            model = Classifier(task[0], has_modules=names[0] == "act1")
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            generator = torch.Generator().manual_seed(seed + 1)
            watcher = None
            logdir = tmp_path / f"{names[0]}-{seed}"
            for step in range(800):
                if step == start:  # a window of 4096 samples is 64 batches
                    watcher = instrument.watch(model, logdir=logdir, interval=800, scalar_interval=every)
                chosen = torch.randint(20_000, (64,), generator=generator)
                optimizer.zero_grad()
                functional.cross_entropy(model(features[chosen]), classes[chosen]).backward()
                optimizer.step()
            assert watcher is not None
            found = watcher.dead_units()
            watcher.close()
            with torch.no_grad():
                first = model.fc1(features)
                second = model.fc2(first.relu())
            truth = torch.cat([(z <= 0).all(0) for z in (first, second)]).numpy()
            called = np.zeros(512, bool)
            for layer, name in enumerate(names):
                status = found[name]
                assert status.samples >= 4096
                assert status.batches >= 32
                assert status.witness == ("activations" if names[0] == "act1" else "gradient rows")
                called[[256 * layer + unit for unit in status.dead]] = True
            by_names.setdefault(names, []).append((called, truth))
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    for pairs in by_names.values():
        called, truth = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        right = (called & truth).sum()
        assert low < truth.mean() < high
        assert right / called.sum() >= 0.9
        assert right / truth.sum() >= 0.9


def test_one_window_is_not_called_early(tmp_path: Path) -> None:
    """With the default window six batches of 16 name nobody, and the bound says how little they are worth."""
    model = mlp(nn.ReLU())
    kill(model[0], 3)  # type: ignore[arg-type]
    status = train(model, tmp_path, config={})["1"]
    assert (status.verdict, status.dead, status.samples, status.batches) == ("watching", (), 96, 6)
    assert status.rate_bound == 3 / 96


@pytest.mark.parametrize(
    ("activation", "bias", "name"),
    [
        (nn.ReLU(), -100.0, "relu"),
        (nn.ReLU(inplace=True), -100.0, "relu"),
        (nn.ReLU6(inplace=True), 100.0, "relu6"),
        (nn.GELU(), -100.0, "gelu"),
        (nn.SiLU(), -100.0, "silu"),
        (nn.ELU(inplace=True), -100.0, "elu"),
        (nn.SELU(inplace=True), -100.0, "selu"),
        (nn.Tanh(), 100.0, "tanh"),
        (nn.Sigmoid(), -100.0, "sigmoid"),
        (nn.Hardtanh(-3.0, 3.0, inplace=True), 100.0, "hardtanh"),
        (nn.LogSigmoid(), 100.0, "logsigmoid"),
    ],
    ids=repr,
)
def test_each_nonlinearity(tmp_path: Path, activation: nn.Module, bias: float, name: str) -> None:
    """A unit pushed into the tail of any nonlinearity is dead, in place or not, and its neighbours are not."""
    model = mlp(activation)
    kill(model[0], 2, 5, bias=bias)  # type: ignore[arg-type]
    status = train(model, tmp_path)["1"]
    assert (status.function, status.verdict, status.dead, status.units) == (name, "dead", (2, 5), 8)
    assert [status.saturated[unit] for unit in (2, 5)] == [1.0, 1.0]
    assert [status.rate[unit] for unit in (2, 5)] == [0.0, 0.0]
    assert max(np.delete(status.saturated, (2, 5))) < 1.0


@pytest.mark.parametrize("activation", [nn.SiLU(inplace=True), nn.Hardswish(inplace=True)], ids=repr)
def test_in_place_and_not_monotone(tmp_path: Path, activation: nn.Module) -> None:
    """Where the input is gone and the output does not tell, the range alone is judged, and that is said."""
    model = mlp(activation)
    kill(model[0], 2)  # type: ignore[arg-type]
    with pytest.warns(InstrumentWarning, match="its input is gone"):
        status = train(model, tmp_path)["1"]
    assert (status.function, status.dead, status.saturated) == (None, (), ())


def test_tanh_saturates_by_its_share(tmp_path: Path) -> None:
    """A unit driven hard from side to side is saturated on the share of samples beyond 2.18 that a count finds."""
    model = mlp(nn.Tanh())
    with torch.no_grad():
        model[0].weight[1] *= 40  # type: ignore[operator, index]
    before = copy.deepcopy(model[0])
    status = train(model, tmp_path, steps=1, config={"dead_window_samples": 1, "dead_window_batches": 1})["1"]
    with torch.no_grad():
        share = (before(data(0, 16, 4)).abs() > 2.178).double().mean(0)
    assert status.saturated == tuple(round(float(value), 4) for value in share)
    assert status.saturated[1] > 0.5
    assert status.dead == ()


def test_always_on_and_leaky(tmp_path: Path) -> None:
    """A ReLU unit that always fires is told apart; a leaky one is never flat and so neither dead nor told."""
    model = mlp(nn.ReLU())
    kill(model[0], 4, bias=8.0)  # type: ignore[arg-type]
    assert train(model, tmp_path / "relu")["1"].always_on == (4,)
    leaky = mlp(nn.LeakyReLU())
    kill(leaky[0], 4)  # type: ignore[arg-type]
    status = train(leaky, tmp_path / "leaky")["1"]
    assert (status.verdict, status.dead, set(status.saturated)) == ("ok", (), {0.0})


def convolutional(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5),
        nn.ReLU(inplace), nn.Linear(5, 2),
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
def test_channels_of_images(tmp_path: Path, memory_format: torch.memory_format, inplace: bool) -> None:
    """Behind a convolution units are channels and samples images; behind a linear layer features and rows."""
    model = convolutional(inplace)
    kill(model[1], 4)  # type: ignore[arg-type]
    kill(model[5], 1)  # type: ignore[arg-type]
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    found = train(model, tmp_path, (16, 3, 8, 8))
    assert (found["2"].units, found["2"].dead, found["2"].samples) == (6, (4,), 64)
    assert (found["6"].units, found["6"].dead, found["6"].samples) == (5, (1,), 64)
    assert (found["0"].units, found["0"].samples, found["0"].function) == (6, 64, None)
    assert list(found) == ["0", "2", "5", "6"]


def test_tokens_are_samples(tmp_path: Path) -> None:
    """In sequences every token is a sample, and the last dimension holds the units."""
    model = mlp(nn.GELU())
    kill(model[0], 0, 7)  # type: ignore[arg-type]
    status = train(model, tmp_path, (2, 8, 4))["1"]
    assert (status.units, status.dead, status.samples, status.batches) == (8, (0, 7), 64, 4)


class Residual(nn.Module):
    """A block whose one ReLU serves two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        out: torch.Tensor = self.head(self.relu(y).mean((2, 3)))
        return out


def test_a_shared_nonlinearity_is_told_apart_by_layer(tmp_path: Path) -> None:
    """One ReLU behind two layers holds the units of both, under a name each: no death is hidden by the other."""
    model = Residual()
    kill(model.bn1, 1)  # type: ignore[arg-type]
    kill(model.bn2, 2)  # type: ignore[arg-type]
    found = train(model, tmp_path, (16, 4, 5, 5))
    assert found["relu"].dead == (1,)
    assert found["relu[conv2]"].dead == (2,)


def test_a_nonlinearity_before_any_layer(tmp_path: Path) -> None:
    """What runs before the first layer does not stand behind the last layer of the pass before."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    status = train(model, tmp_path)["0"]
    assert (status.function, status.units, status.samples, status.batches) == ("tanh", 4, 64, 4)


def test_an_output_that_was_changed_in_place_is_looked_at_again(tmp_path: Path) -> None:
    """Ranges found for a layer's output are not those of what an in-place operation made of it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc(x)
            hidden -= torch.tensor([0.0, 100.0] * 4)
            out: torch.Tensor = self.head(self.act(hidden))
            return out

    assert train(Net(), tmp_path)["act"].dead == (1, 3, 5, 7)


def test_several_outputs_are_judged_by_the_first(tmp_path: Path) -> None:
    """Of a recurrent layer the hidden states are judged, under the name that their tag has."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.lstm(x)[0])
            return out

    found = train(Net(), tmp_path, (2, 8, 4))
    assert {name: (status.units, status.samples) for name, status in found.items()} == {"lstm[0]": (6, 64)}


def test_gradients_that_do_not_count_take_their_rows_along() -> None:
    """When a gradient is discarded, because a wrapped optimizer uses another, so are its rows."""
    buffer = Buffer(4)
    buffer.open(0)
    for name in ("fc.weight", "act"):
        buffer.add_units(name, UnitTally.empty(3))
        buffer.discard(Site("gradients", name) if name == "fc.weight" else Site("activations", name))
    assert buffer.units() == ("act",)


def test_functions_make_an_output_the_input_of_a_nonlinearity(tmp_path: Path) -> None:
    """With `functions`, what a linear layer returns is judged as z of that function."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x + self.fc2(functional.gelu(self.fc1(x)))
            return out

    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(4, 1)})
    kill(model["blocks"][1].fc1, 6)  # type: ignore[index]
    found = train(
        model,
        tmp_path,
        forward=lambda model, x: model["head"](model["blocks"](x)),  # type: ignore[index]
        functions={"blocks.*.fc1": "gelu"},
    )
    assert (found["blocks.1.fc1"].function, found["blocks.1.fc1"].dead) == ("gelu", (6,))
    assert (found["blocks.0.fc1"].function, found["blocks.0.fc1"].dead) == ("gelu", ())
    assert found["blocks.0.fc2"].witness == "gradient rows"


def test_functions_reach_a_norm(tmp_path: Path) -> None:
    """A norm is exempt, but for one that `functions` names: `relu(bn(x))` is judged, by channel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(functional.relu(self.bn(self.conv(x))).mean((2, 3)))
            return out

    model = Net()
    kill(model.bn, 5)  # type: ignore[arg-type]
    found = train(model, tmp_path, (16, 3, 6, 6), functions={"bn": "relu"})
    assert (found["bn"].units, found["bn"].dead, found["bn"].samples) == (6, (5,), 64)


def test_functions_that_cannot_be_meant(tmp_path: Path) -> None:
    """An unknown function, or a glob that matches no module, is refused at once with what lies nearest."""
    model = mlp(nn.ReLU())
    with pytest.raises(ConfigError, match=r"functions: '0': found 'gelo'.*did you mean 'gelu'\?"):
        instrument.watch(model, logdir=tmp_path, functions={"0": "gelo"})
    with pytest.raises(SelectionError, match=r"functions='fc\*' matches no module"):
        instrument.watch(model, logdir=tmp_path, functions={"fc*": "gelu"})


class Experts(nn.Module):
    """Two experts, of which the first gets all tokens and the second none; a third is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(len(x), dtype=torch.int64)
        out = torch.zeros(len(x), 2)
        for number in (0, 1):
            place = torch.nonzero(chosen == number).flatten()
            out = out.index_add(0, place, self.experts[number](x[place]))
        result: torch.Tensor = self.head(out)
        return result


@pytest.mark.filterwarnings("ignore:never called in the first sampled step")
def test_experts_without_a_token(tmp_path: Path) -> None:
    """Units of an expert that saw no token, or was never called, are no data and never dead."""
    found = train(Experts(), tmp_path)
    assert found["experts.0.1"].verdict == "ok"
    for number, units in ((1, 8), (2, 0)):
        status = found[f"experts.{number}.1"]
        assert (status.verdict, status.dead, status.units, status.samples) == ("no-data", (), units, 0)
    assert all(status.verdict != "dead" for status in found.values())


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    """Samples of evaluation, in which a unit would fire, are no evidence."""
    model = mlp(nn.ReLU())
    kill(model[0], 3, bias=-20.0)  # type: ignore[arg-type]

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.eval()
        model(100.0 * x)
        with torch.no_grad():
            model.train()(100.0 * x)
        out: torch.Tensor = model(x)
        return out

    status = train(model, tmp_path, forward=forward)["1"]
    assert (status.dead, status.samples, status.batches) == ((3,), 64, 4)


def test_micro_batches_are_merged(tmp_path: Path) -> None:
    """Micro-batches of one step are several batches of its samples, and one step of the evidence."""
    model = mlp(nn.ReLU())

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model(x[:4]).square().mean().backward()
        out: torch.Tensor = model(x[4:])
        return out

    status = train(model, tmp_path, steps=2, forward=forward)["1"]
    assert (status.samples, status.batches, status.first_step, status.last_step) == (32, 4, 0, 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_harmless(tmp_path: Path, use_reentrant: bool) -> None:
    """Activation checkpointing counts every sample once and finds the same units."""
    model = mlp(nn.ReLU())
    kill(model[0], 3)  # type: ignore[arg-type]
    plain = train(copy.deepcopy(model), tmp_path / "plain")

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model[:2]
            self.head = model[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = checkpoint(self.body, x.requires_grad_(), use_reentrant=use_reentrant)
            out: torch.Tensor = self.head(hidden)
            return out

    found = train(Checkpointed(), tmp_path / "checkpointed")
    assert found["body.1"].as_dict() == {**plain["1"].as_dict(), "name": "body.1"}
    assert found["body.1"].dead == (3,)


def test_constant_units(tmp_path: Path) -> None:
    """A unit whose weights are zero and frozen returns its bias for ever: constant, and not dead."""
    model = mlp(nn.Tanh())
    with torch.no_grad():
        model[0].weight[2] = 0.0  # type: ignore[operator]
    model[0].requires_grad_(False)
    found = train(model, tmp_path)
    assert (found["0"].constant, found["1"].constant, found["1"].dead) == ((2,), (2,), ())


def test_what_is_exempt(tmp_path: Path) -> None:
    """Embeddings, norms, dropout, the last layer and what follows it, and containers are not judged."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 6)
            self.norm = nn.LayerNorm(6)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1))
            self.head = nn.Linear(8, 3)
            self.out = nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.abs().mul(10).long().clamp(max=49)
            out: torch.Tensor = self.out(self.head(self.body(self.norm(self.embedding(tokens)))))
            return out

    model = Net()
    kill(model.head, 1)
    with torch.no_grad():
        model.embedding.weight[:, 3] = 0.5
    assert list(train(model, tmp_path)) == ["body.0", "body.1"]


def test_frozen_layers_without_observation_are_no_data(tmp_path: Path) -> None:
    """A layer whose weight gets no gradient, seen by nothing else, is no data and not dead."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = functional.linear(x, self.fc1.weight, self.fc1.bias).relu()
            hidden = functional.linear(hidden, self.fc2.weight * 0.0, self.fc2.bias).relu()
            out: torch.Tensor = self.head(hidden)
            return out

    model = Net()
    kill(model.fc2, 1)
    with pytest.warns(InstrumentWarning, match="never called"):
        found = train(model, tmp_path, config={"dead_window_samples": 4, "dead_window_batches": 4})
    # Behind weights of zero no gradient comes through: of fc1 nothing is known. Rows of fc2 are multiplied by zero too.
    assert {name: status.verdict for name, status in found.items()} == {"fc1": "no-data", "fc2": "no-data"}


def test_rows_tell_where_nothing_else_does(tmp_path: Path) -> None:
    """Weights that a parent uses itself are judged by their gradient rows; a step counts its samples by the output."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(functional.linear(x, self.fc.weight, self.fc.bias).relu())
            return out

    model = Net()
    kill(model.fc, 3)
    with pytest.warns(InstrumentWarning, match="never called"):
        status = train(model, tmp_path)["fc"]
    assert (status.witness, status.dead, status.samples, status.batches) == ("gradient rows", (3,), 64, 4)


def test_compiled_modules_are_judged_by_rows(tmp_path: Path) -> None:
    """Inside a compiled region no module is seen, and the rows of gradients name the dead units."""
    model = mlp(nn.ReLU())
    kill(model[0], 3, 5)  # type: ignore[arg-type]
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(InstrumentWarning, match=r"inside a region of torch\.compile"):
        found = train(compiled, tmp_path)  # type: ignore[arg-type]
    assert (found["0"].witness, found["0"].dead, found["0"].samples) == ("gradient rows", (3, 5), 64)
    assert found["1"].verdict == "no-data"
    torch.compiler.reset()


def test_only_what_is_watched(tmp_path: Path) -> None:
    """Without activations, or outside of `include`, nothing is judged."""
    assert train(mlp(nn.ReLU()), tmp_path / "a", kinds=["parameters", "gradients"]) == {}
    assert list(train(mlp(nn.ReLU()), tmp_path / "b", include=["1"])) == ["1"]


def test_odd_outputs_are_passed_over(tmp_path: Path) -> None:
    """Integers, nothing at all and numbers as output are no error and have no units."""

    class Odd(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: torch.Tensor) -> Any:
            return self.value

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.ModuleList(
                Odd(value) for value in [torch.arange(4), None, 3, torch.tensor(1.0), torch.eye(3).to_sparse()]
            )
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in self.odd:
                module(x)
            out: torch.Tensor = self.head(self.fc(x))
            return out

    assert list(train(Net(), tmp_path)) == ["fc"]


def test_history_keeps_few_tallies(tmp_path: Path) -> None:
    """Tallies are kept in the newest record alone, however long the history is."""
    model = mlp(nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with instrument.watch(model, logdir=tmp_path, interval=1) as watcher:
        for step in range(5):
            optimizer.zero_grad()
            model(data(step, 16, 4)).square().mean().backward()
            optimizer.step()
        assert [sorted(record.units) for record in watcher.history] == [[]] * 4 + [["0", "1"]]


@pytest.mark.parametrize("make", [lambda: convolutional(True), lambda: mlp(nn.GELU()), Experts, Residual])
@pytest.mark.filterwarnings("ignore:never called in the first sampled step")
def test_training_is_bit_identical(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    """Losses, parameters and the random state are the same with units judged at every step and without."""
    ends = []
    for is_watched in (False, True):
        torch.manual_seed(5)
        model = make()
        kill(next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))), 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = next(model.parameters())
        shape = (6, first.shape[1], 8, 8) if first.dim() == 4 else (6, 4)
        watcher = instrument.watch(model, logdir=tmp_path, interval=1, strict=True) if is_watched else None
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            loss = model(data(step, *shape)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if watcher is not None:
            assert watcher.dead_units()
            watcher.close()
        ends.append((losses, [*map(torch.clone, model.state_dict().values()), torch.get_rng_state()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_units_are_judged_at_most_once_in_the_interval_of_scalars(tmp_path: Path) -> None:
    """With histograms on every step and scalars every fourth, units are written on steps 0, 4, 8 and at the end."""
    train(mlp(nn.ReLU()), tmp_path, steps=11, scalar_interval=4)
    judged = {contents.step: contents.documents for contents in read_steps(tmp_path) if UNITS_TAG in contents.documents}
    assert list(judged) == [0, 4, 8, 10]
    histograms, _ = read_back(tmp_path)
    assert histograms["Activations/1"] == list(range(11))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_fault_in_the_rows_of_gradients_costs_no_gradient(
    is_scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether gradients come at once or are made one by one, those of each step are recorded, and the fault told."""

    def fails(*arguments: object) -> None:
        raise RuntimeError("no room for rows")

    monkeypatch.setattr(RowTallies, "add", fails)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    with (
        pytest.warns(InstrumentWarning, match="no room for rows"),
        instrument.watch(model, logdir=tmp_path, interval=1) as watcher,
    ):
        for step in range(2):
            optimizer.zero_grad()
            model(data(step, 16, 4)).square().mean().backward()
            if is_scaled:
                optimizer.__dict__.update(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))
            optimizer.step()
        watcher.flush()
        assert [sum(tag.startswith("Gradients/") for tag in record) for record in watcher.history] == [4, 4]


def test_elements_of_a_flat_shard_are_no_rows(tmp_path: Path) -> None:
    """A layer whose weight lies flat, as sharding engines leave it, has no unit for each of its elements."""

    class Flat(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weight.view(8, 4), self.bias)

    flat = Flat(4, 8)
    flat.weight = nn.Parameter(flat.weight.detach().view(-1).clone())
    model = nn.Sequential(flat, nn.Linear(8, 8), nn.Linear(8, 2))
    status = train(model, tmp_path)
    assert {name: (each.units, each.witness) for name, each in status.items()} == {
        "0": (8, "activations"), "1": (8, "gradient rows")
    }  # fmt: skip
