"""What modules return and how they are called: in place, nested, unused, by keyword, shared, replaced."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import instrument

from .harness import data, of_kind, plain_step, train, twins


class InPlace(nn.Module):
    """In-place ReLU, addition, slice assignment, and a change of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Change tensors in place on the way."""
        x = x.clone()
        x *= 2
        y = self.fc(x)
        y += 1
        y[:, 0] = 0
        y = self.act(y)
        out: torch.Tensor = self.out(y)
        out -= out.mean()
        return out


def test_values_are_those_before_changes_in_place(tmp_path: Path) -> None:
    """What was changed in place afterwards is recorded as it left the module, and nothing raises."""
    watched = twins(InPlace, tmp_path)
    record = watched.records[0]
    torch.manual_seed(3)
    model: Any = InPlace()
    before = model.fc(data(0) * 2)
    assert record["Activations/fc"].l2 == pytest.approx(before.double().norm().item(), rel=1e-6)
    before = before + 1
    before[:, 0] = 0
    assert record["Activations/act"].l2 == pytest.approx(before.relu().double().norm().item(), rel=1e-6)
    assert record["Activations/out"].mean != pytest.approx(0.0, abs=1e-6)  # the mean is taken out only later


class Fields(NamedTuple):
    """A named tuple."""

    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Result:
    """A dataclass."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary that is a class of its own, as transformers has it."""


class Part(nn.Module):
    """Returns its input in some wrapping."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        """Wrap what the layer makes of the input."""
        y = self.fc(x)
        wrapped: dict[str, Any] = {
            "dict": {"logits": y, "none": None},
            "model output": ModelOutput(logits=y, states=(y * 2, y * 3)),
            "dataclass": Result(y),
            "named tuple": Fields(y, y * 2),
            "nested": [(y, [y * 2, {"deep": y * 3}]), None],
            "packed": pack_sequence([y[:4], y[4:]]),
            "none": None,
        }
        self.kept = y
        return wrapped[self.how]


class Wrapped(nn.Module):
    """Unwraps what its part returns."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.part = Part(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum all tensors of the part's output."""
        output = self.part(x)
        total: torch.Tensor = self.part.kept.sum()
        stack = [output]
        while stack:
            item = stack.pop()
            if isinstance(item, PackedSequence):
                total = total + item.data.sum()
            elif isinstance(item, torch.Tensor):
                total = total + item.sum()
            elif isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, (tuple, list)):
                stack += item
            elif dataclasses.is_dataclass(item):
                stack += vars(item).values()
        return total[None]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("dict", {"part[logits]"}),
        ("model output", {"part[logits]", "part[states][0]", "part[states][1]"}),
        ("dataclass", {"part[logits]"}),
        ("named tuple", {"part[left]", "part[right]"}),
        ("nested", {"part[0][0]", "part[0][1][0]", "part[0][1][1][deep]"}),
        ("packed", {"part"}),
        ("none", set()),
    ],
)
def test_every_tensor_of_an_output_has_a_stable_name(how: str, expected: set[str], tmp_path: Path) -> None:
    """Each tensor in an output, and its gradient, is recorded under a name that is the same at every step."""
    watched = twins(lambda: Wrapped(how), tmp_path)
    for record in watched.records:
        for section in ("Activations", "ActivationGradients"):
            assert {name for name in of_kind(record, section) if name.startswith("part")} == expected | {"part.fc"}
    torch.manual_seed(3)
    model: Any = Wrapped(how)
    size = model.part.fc(data(0)).detach().double().norm().item()
    found = of_kind(watched.records[0], "Activations")
    for name in expected:
        times = {"part[states][0]": 2, "part[states][1]": 3, "part[right]": 2, "part[0][1][0]": 2,
                 "part[0][1][1][deep]": 3}.get(name, 1)  # fmt: skip
        assert found[name].count == 24
        assert found[name].l2 == pytest.approx(times * size, rel=1e-5), name


class Chunked(nn.Module):
    """Splits an output in two and uses one half."""

    class Split(nn.Module):
        """Two views of one tensor."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.chunk(2, dim=1)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.split = self.Split()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use the first half only."""
        used: torch.Tensor = self.split(self.fc(x))[0]
        return used


def test_an_output_that_is_not_used_has_no_gradient(tmp_path: Path) -> None:
    """The gradient hook of an unused half is called with None: nothing is recorded for it, and nothing raises."""
    record = twins(Chunked, tmp_path).records[-1]
    assert {"split[0]", "split[1]"} <= set(of_kind(record, "Activations"))
    assert "split[0]" in of_kind(record, "ActivationGradients")
    assert "split[1]" not in of_kind(record, "ActivationGradients")


class ByKeyword(nn.Module):
    """Calls its child with keywords alone."""

    class Child(nn.Module):
        """Takes keywords alone."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(hidden)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass the input by name."""
        out: torch.Tensor = self.child(hidden=x)
        return out


def test_calls_by_keyword_are_recorded(tmp_path: Path) -> None:
    """A module that is called by keyword alone is recorded, gradient included."""
    record = twins(ByKeyword, tmp_path).records[-1]
    assert record["Activations/child"].count == 12
    assert record["ActivationGradients/child"].count == 12


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed by the sign of the input."""
        out: torch.Tensor = self.lm_head(self.emb((x > 0).long().sum(1)))
        return out


def test_a_tied_weight_is_found_by_each_name_and_recorded_once(tmp_path: Path) -> None:
    """`include="lm_head.*"` finds the tied weight, with the sum of both gradients, and only once."""
    watched = twins(Tied, tmp_path, include=["lm_head.*"], kinds=["parameters", "gradients"])
    assert set(watched.records[-1]) == {"Parameters/lm_head.weight", "Gradients/lm_head.weight"}
    assert watched.records[0]["Gradients/lm_head.weight"].count == 28
    torch.manual_seed(3)
    model: Any = Tied()
    model(data(0)).float().square().mean().backward()
    assert model.emb.weight is model.lm_head.weight
    both = model.emb.weight.grad.double().norm().item()
    assert watched.records[0]["Gradients/lm_head.weight"].l2 == pytest.approx(both, rel=1e-6)
    everything = twins(Tied, tmp_path, kinds=["gradients"])
    assert set(everything.records[-1]) == {"Gradients/emb.weight"}


class Shared(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer three times."""
        out: torch.Tensor = self.fc(self.fc(self.fc(x)))
        return out


def test_calls_of_a_shared_module_are_merged(tmp_path: Path) -> None:
    """Three calls of one module are one sketch of all their values, activations and gradients alike."""
    record = twins(Shared, tmp_path).records[0]
    torch.manual_seed(3)
    model: Any = Shared()
    one = model.fc(data(0))
    two = model.fc(one)
    three = model.fc(two)
    values = torch.cat((one, two, three)).double()
    assert record["Activations/fc"].count == values.numel() == 72
    assert record["Activations/fc"].l2 == pytest.approx(values.norm().item(), rel=1e-6)
    assert record["ActivationGradients/fc"].count == 72


def test_a_model_called_twice_a_step_is_one_step(tmp_path: Path) -> None:
    """A siamese loop calls the model twice: one record a step, with the values of both calls."""

    def siamese(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (model(data(step)) - model(data(step + 50))).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    watched = twins(lambda: nn.Sequential(nn.Linear(4, 3)), tmp_path, siamese)
    assert [record.step for record in watched.records] == [0, 1, 2, 3]
    assert watched.records[-1]["Activations/0"].count == 2 * 6 * 3


class Changed(nn.Module):
    """A model on which the user has hooks that change outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.fc.register_forward_hook(lambda module, args, output: output * 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the hooked layer."""
        out: torch.Tensor = self.fc(x)
        return out


def test_a_users_hook_that_changes_an_output_comes_first(tmp_path: Path) -> None:
    """Where a hook of the user's replaces an output, the replaced one is recorded, also if it came after the watch."""

    def with_late_hook(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        if step == 2:
            layer: Any = model.fc
            layer.register_forward_hook(lambda module, args, output: output * 10)
        return plain_step(model, optimizer, step)

    watched = twins(Changed, tmp_path, with_late_hook, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    for record, factor in zip(watched.records, (100, 100, 1000, 1000), strict=True):
        torch.manual_seed(3)
        layer: Any = Changed().fc
        plain = layer.forward(data(record.step)).double().norm().item()
        assert record["Activations/fc"].l2 == pytest.approx(factor * plain, rel=1e-5)


class Functional(nn.Module):
    """A list of layers of which one is used through its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use the second layer's weight without calling the layer."""
        layer: Any = self.layers[1]
        out: torch.Tensor = nn.functional.linear(self.layers[0](x), layer.weight)
        return out


def test_what_is_never_called_is_said_once(tmp_path: Path) -> None:
    """A layer whose weight is used without a call is named in one notice; its parameters are recorded."""
    with pytest.warns(instrument.InstrumentWarning, match=r"never called .*: layers\.1;"):
        watched = train(Functional, tmp_path)
    assert len(watched.notices) == 1
    assert "layers.1.weight" in of_kind(watched.records[-1], "Gradients")


class Subclass(torch.Tensor):
    """A tensor of a class of its own."""


@dataclasses.dataclass
class Exotic:
    """A way to make an odd tensor of shape (6, 4) or another, and what is said of it."""

    make: Any
    counts: tuple[int, int, int] | None = None
    """How many values are finite, NaN and infinite; None where it cannot be measured."""
    notice: str = ""


EXOTIC = {
    "nan": Exotic(lambda y: y * float("nan"), (0, 24, 0)),
    "inf": Exotic(lambda y: y.abs() / 0, (0, 0, 24)),
    "empty": Exotic(lambda y: y[:0], (0, 0, 0)),
    "0-dim": Exotic(lambda y: y.sum(), (1, 0, 0)),
    "expanded": Exotic(lambda y: y.sum(0).expand(9, -1), (36, 0, 0)),
    "not contiguous": Exotic(lambda y: y.t()[::2], (12, 0, 0)),
    "float16 overflow": Exotic(lambda y: (y.abs() + 1e6).half(), (0, 0, 24)),
    "float8": Exotic(lambda y: y.detach().to(torch.float8_e4m3fn), (24, 0, 0)),
    "int": Exotic(lambda y: y.detach().long(), (24, 0, 0)),
    "bool": Exotic(lambda y: y > 0, (24, 0, 0)),
    "complex": Exotic(torch.fft.fft, (24, 0, 0)),
    "conjugate view": Exotic(lambda y: torch.fft.fft(y).conj(), (24, 0, 0)),
    "sparse": Exotic(lambda y: y.to_sparse(), (24, 0, 0)),
    "compressed": Exotic(lambda y: y.detach().to_sparse_csr(), (24, 0, 0)),
    "subclass": Exotic(lambda y: y.as_subclass(Subclass), (24, 0, 0)),
    "parameter": Exotic(lambda y: nn.Parameter(y.detach()), (24, 0, 0)),
    "quantized": Exotic(lambda y: torch.quantize_per_tensor(y.detach(), 0.1, 0, torch.quint8), None, "quantized"),
    "nested": Exotic(lambda y: torch.nested.nested_tensor([y[0], y[1]]), None, "nested tensor"),
    "jagged": Exotic(lambda y: torch.nested.nested_tensor([y[:2], y[:3]], layout=torch.jagged), None, "wraps other"),
    "masked": Exotic(lambda y: torch.masked.masked_tensor(y.detach(), y.detach() > 0), None, "wraps other"),
    "mkldnn": Exotic(lambda y: y.detach().to_mkldnn(), None, "layout"),
    "meta": Exotic(lambda y: y.to("meta"), None, "meta device"),
    "no tensor": Exotic(lambda y: ["a", 1, None]),
}


class Beside(nn.Module):
    """Computes something odd beside what is trained."""

    class Odd(nn.Module):
        """Returns what it is told to make."""

        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how

        def forward(self, y: torch.Tensor) -> Any:
            """Make it."""
            return EXOTIC[self.how].make(y)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.odd = self.Odd(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Train on the layer's output alone."""
        y: torch.Tensor = self.fc(x)
        self.odd(y)
        return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", EXOTIC)
def test_any_kind_of_tensor_is_counted_or_said(how: str, tmp_path: Path) -> None:
    """Whatever a module returns, training is the same: its values are counted, or one notice says why not."""
    watched = twins(lambda: Beside(how), tmp_path)
    for record in watched.records:
        found = of_kind(record, "Activations")
        assert found["fc"].count == 24
        sketch = found.get("odd")
        assert (sketch and (sketch.count, sketch.nan_count, sketch.inf_count)) == EXOTIC[how].counts
    assert len(watched.notices) == bool(EXOTIC[how].notice)
    assert all(EXOTIC[how].notice in notice for notice in watched.notices)


def test_sparse_gradients_are_those_of_the_whole_matrix(tmp_path: Path) -> None:
    """The sparse gradient of an embedding counts the zeros that it implies, and repeated rows once, added up."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    truth = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 2])).square().sum().backward()
        gradient = model.get_parameter("0.weight").grad
        assert gradient is not None
        assert gradient.is_sparse
        truth.append(gradient.to_dense().norm().item())
        optimizer.step()
    sketches = [record["Gradients/0.weight"] for record in watcher.history]
    assert [sketch.count for sketch in sketches] == [40] * 3
    assert [sketch.zero_fraction for sketch in sketches] == [0.8] * 3
    assert [sketch.l2 for sketch in sketches] == pytest.approx(truth, rel=1e-6)
    watcher.close()


class Leaves(nn.Module):
    """Returns a parameter, and its own input."""

    class Weight(nn.Module):
        """A module that returns its parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(4))

        def forward(self) -> torch.Tensor:
            return self.value

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.Weight()
        self.same = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply the input with the parameter."""
        out: torch.Tensor = self.same(x) * self.weight()
        return out


def test_hooks_on_leaves_do_not_outlive_the_step(tmp_path: Path) -> None:
    """An output that is a parameter, or the user's own input, carries no hook of ours when the step is over."""
    torch.manual_seed(3)
    model: Any = Leaves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, kinds=["activation_gradients"], interval=1, logdir=tmp_path, strict=True)
    x = data(0).requires_grad_()
    model(x).square().mean().backward()
    optimizer.step()
    assert not x._backward_hooks
    assert not model.weight.value._backward_hooks
    assert set(of_kind(watcher.history[-1], "ActivationGradients")) == {"Leaves", "weight", "same"}
    watcher.close()


def test_names_with_slashes_spaces_and_other_scripts_work(tmp_path: Path) -> None:
    """Modules may have any name that torch allows, and are found by it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("a/b", "with space", "слой", "module"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.children():
                x = layer(x)
            out: torch.Tensor = x
            return out

    record = twins(Odd, tmp_path).records[-1]
    assert {"a/b", "with space", "слой", "module"} <= set(of_kind(record, "Activations"))
    picked = twins(Odd, tmp_path, include=["a/b", "слой", "module.weight"], kinds=["gradients"]).records[-1]
    assert set(of_kind(picked, "Gradients")) == {"a/b.weight", "a/b.bias", "слой.weight", "слой.bias", "module.weight"}
