"""`watch()` from end to end: which events a training writes, which records it leaves, and what they say."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

import instrument
from instrument.config import KINDS
from instrument.measure.batch import Batch
from instrument.record.runs import resolve_run

from .training import batch, mlp, read_back, train


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_the_whole_list_of_events_of_a_small_training(tmp_path: Path) -> None:
    """A training of 8 steps with interval 4 and scalar interval 2 writes exactly these tags at these steps."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    watcher = instrument.watch(model, kinds=KINDS, interval=4, scalar_interval=2, logdir=tmp_path, strict=True)
    train(model, sgd(model), 8)
    watcher.close()
    histograms, scalars = read_back(tmp_path)

    # The last step, 7, was not sampled: parameters are logged at the end, and gradients that are still there.
    every, with_last = [0, 4], [0, 4, 7]
    modules = ["Sequential", "0", "1"]
    parameters = ["0.weight", "0.bias"]
    expected = {f"Activations/{name}": every for name in modules}
    expected |= {f"ActivationGradients/{name}": every for name in modules}
    expected |= {f"ActivationGradients.log10/{name}": every for name in modules}
    expected |= {f"Updates/{name}": every for name in parameters}
    expected |= {f"Updates.log10/{name}": every for name in parameters}
    expected |= {f"Parameters/{name}": with_last for name in parameters}
    expected |= {f"Gradients/{name}": with_last for name in parameters}
    expected |= {f"Gradients.log10/{name}": with_last for name in parameters}
    assert histograms == expected

    every, with_last = [0, 2, 4, 6], [0, 2, 4, 6, 7]
    expected = {}
    for statistic in ("rms", "mean", "std", "abs_max", "zero_fraction"):
        for section in ("Activations", "ActivationGradients"):
            expected |= {f"{section}.{statistic}/{name}": every for name in modules}
        for section in ("Parameters", "Gradients"):
            expected |= {f"{section}.{statistic}/{name}": with_last for name in parameters}
        expected |= {f"Updates.{statistic}/{name}": every for name in parameters}
    # What readings need beside: the norm of all gradients, and the size of updates of matrices over that of the matrix.
    expected |= {"Gradients.l2/_global": with_last}
    expected |= {f"Updates.log10_ratio/{name}": every for name in ("0.weight", "_guide")}
    assert {tag: list(values) for tag, values in scalars.items()} == expected


def test_values_are_those_of_the_training(tmp_path: Path) -> None:
    """Activations, gradients, updates and parameters of each step equal those computed beside it."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizer = sgd(model, lr=0.5)
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
    truth = []
    weight: Any = model[0].weight
    for step in range(4):
        optimizer.zero_grad()
        before = weight.detach().clone()
        output = model(batch(step))
        output.retain_grad()
        output.square().sum().backward()
        assert weight.grad is not None
        assert output.grad is not None
        gradient = weight.grad.clone()
        optimizer.step()
        truth.append(
            (
                output.detach(),
                output.grad,
                gradient,
                weight.detach().double() - before.double(),
                weight.detach().clone(),
            )
        )
    assert [record.step for record in watcher.history] == [0, 1, 2, 3]
    for record, tensors in zip(watcher.history, truth, strict=True):
        tags = [
            "Activations/0",
            "ActivationGradients/0",
            "Gradients/0.weight",
            "Updates/0.weight",
            "Parameters/0.weight",
        ]
        for tag, tensor in zip(tags, tensors, strict=True):
            values = tensor.double().numpy()
            assert record[tag].count == values.size
            assert record[tag].min == values.min()
            assert record[tag].max == values.max()
            assert record[tag].l2 == pytest.approx(np.linalg.norm(values), rel=1e-9)
    watcher.close()


def test_micro_batches_and_repeated_calls_merge_into_one_sketch(tmp_path: Path) -> None:
    """Four micro-batches through a module called twice count eight times its output, and one gradient."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(self.fc(x))
            return out

    model = Twice()
    optimizer = sgd(model)
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(4):
            model(batch(10 * step + micro, size=5)).mean().backward()
        accumulated = model.fc.weight.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
    assert [record.step for record in watcher.history] == [0, 1, 2]
    assert watcher.history[-1]["Activations/fc"].count == 4 * 2 * 5 * 4
    assert watcher.history[-1]["Gradients/fc.weight"].l2 == pytest.approx(accumulated.norm().item(), rel=1e-6)
    watcher.close()


def test_a_container_that_returns_what_its_child_returned_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensor is measured once for child and container; changed in place between, it is measured again."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x)
            return out.add_(1.0)

    measured: list[torch.Size] = []
    put = Batch.put

    def counting(batch: Batch, tensor: torch.Tensor) -> Any:
        measured.append(tensor.shape)
        return put(batch, tensor)

    monkeypatch.setattr(Batch, "put", counting)
    for model, times in ((nn.Sequential(nn.Linear(4, 3)), 1), (InPlace(), 2)):
        measured.clear()
        watcher = instrument.watch(model, kinds="activations", interval=1, logdir=tmp_path, strict=True)
        train(model, sgd(model), 1)
        assert len(measured) == times
        child, parent = watcher.history[-1].values()
        assert parent.mean - child.mean == pytest.approx(times - 1, rel=1e-6)
        watcher.close()


def test_updates_of_a_large_parameter_are_right_within_one_percent(tmp_path: Path) -> None:
    """Of two million elements, a sample of 65,536 or fewer gives the root mean square of the update within 1 %."""
    model = nn.Linear(2048, 1024, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watcher = instrument.watch(model, kinds=("updates",), interval=1, logdir=tmp_path, strict=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 2048)).square().mean().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        change = (model.weight.detach() - before).double()
        sketch = watcher.history[-1]["Updates/weight"]
        assert sketch.count <= 65_536
        assert sketch.rms == pytest.approx(change.square().mean().sqrt().item(), rel=0.01)
    watcher.close()


def test_the_sample_of_an_update_visits_all_columns(tmp_path: Path) -> None:
    """Where each column of a square matrix changes by its own amount, the sample still sees their mean."""
    model = nn.Linear(1024, 1024, bias=False)
    watcher = instrument.watch(model, kinds=("updates",), interval=1, logdir=tmp_path, strict=True)
    optimizer = sgd(model, lr=1.0)
    model.weight.grad = torch.arange(1024.0).expand(1024, 1024).clone()
    before = model.weight.detach().clone()
    optimizer.step()
    truth = (model.weight.detach() - before).double().square().mean().sqrt().item()
    assert watcher.history[-1]["Updates/weight"].rms == pytest.approx(truth, rel=0.01)
    watcher.close()


@pytest.mark.parametrize("interval", [0, -1, -100])
def test_an_interval_of_zero_or_below_attaches_and_writes_nothing(interval: int, tmp_path: Path) -> None:
    """With interval 0 or below no hook exists, no file is made, and the watcher says that it is off."""
    model = mlp()
    watcher = instrument.watch(model, interval=interval)
    assert repr(watcher) == f"Watcher(off: interval is {interval})"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with watcher:
        train(model, sgd(model), 3)
        watcher.writer.add_scalar("loss", 1.0, 0)
        watcher.step()
        watcher.flush()
    assert (watcher.sites, watcher.history, watcher.notices, watcher.logdir) == ((), (), (), None)
    assert list(tmp_path.iterdir()) == []


def test_scalars_are_sampled_at_most_an_interval_apart(tmp_path: Path) -> None:
    """A scalar interval above the interval counts as the interval; steps 0, N, 2N of either are sampled."""
    model = mlp()
    watcher = instrument.watch(model, interval=3, logdir=tmp_path, strict=True)
    train(model, sgd(model), 7)
    assert [record.step for record in watcher.history] == [0, 3, 6]
    watcher = rewatch(model, tmp_path, interval=5, scalar_interval=2)
    train(model, sgd(model), 11)
    assert [record.step for record in watcher.history] == [0, 2, 4, 5, 6, 8, 10]
    watcher.close()


def rewatch(model: nn.Module, logdir: Path, **arguments: int) -> instrument.Watcher:
    instrument.unwatch(model)
    return instrument.watch(model, logdir=logdir, strict=True, **arguments)  # type: ignore[arg-type]


def test_history_is_bounded(tmp_path: Path) -> None:
    """Only the last records are kept, oldest first."""
    model = mlp()
    watcher = instrument.watch(model, interval=1, config={"history": 5}, logdir=tmp_path, strict=True)
    train(model, sgd(model), 12)
    assert [record.step for record in watcher.history] == [7, 8, 9, 10, 11]
    watcher.close()


def test_what_is_given_goes_before_the_file(tmp_path: Path) -> None:
    """Arguments go before the configuration, also those that equal the defaults; the rest comes from it."""
    config = {"include": ["0"], "kinds": ["gradients"], "histogram_interval": 3, "compiled": "eager", "ranks": "each"}
    model = mlp()
    watcher = instrument.watch(model, config=config, logdir=tmp_path)
    assert watcher.config.include == ("0",)
    assert (watcher.config.compiled, watcher.config.histogram_interval) == ("eager", 3)
    assert {site.kind for site in watcher.sites} == {"gradients"}
    watcher.close()
    everything = ("**",)
    watcher = instrument.watch(
        model, list(everything), config=config, logdir=tmp_path, kinds=["parameters"], interval=7,
        compiled="out" + "side", ranks="fir" + "st",
    )  # fmt: skip
    assert watcher.config.include == ("**",)
    assert (watcher.config.compiled, watcher.config.ranks, watcher.config.histogram_interval) == ("outside", "first", 7)
    assert {site.kind for site in watcher.sites} == {"parameters"}
    watcher.close()


def test_sites_are_what_is_selected_and_several_outputs_stand_for_their_module(tmp_path: Path) -> None:
    """Sites are (kind, name); once it has run, an LSTM stands for each of its outputs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.lstm(x)[0]
            return out

    model = Net()
    watcher = instrument.watch(model, ["lstm"], kinds="activations", interval=1, logdir=tmp_path, strict=True)
    assert watcher.sites == (("activations", "lstm"),)
    train(model, sgd(model), 1)
    assert list(watcher.history[-1]) == ["Activations/lstm[0]", "Activations/lstm[1][0]", "Activations/lstm[1][1]"]
    assert [site.name for site in watcher.sites] == ["lstm[0]", "lstm[1][0]", "lstm[1][1]"]
    watcher = rewatch_include(model, "lstm[1]", tmp_path)
    train(model, sgd(model), 1)
    assert list(watcher.history[-1]) == ["Activations/lstm[1][0]", "Activations/lstm[1][1]"]
    watcher.close()


def rewatch_include(model: nn.Module, include: str, logdir: Path) -> instrument.Watcher:
    instrument.unwatch(model)
    return instrument.watch(model, include, kinds="activations", interval=1, logdir=logdir, strict=True)


def test_a_module_that_is_never_called_is_named_once(tmp_path: Path) -> None:
    """`out_proj` of attention, whose weight its parent uses, is named in one notice; its parameters are there."""
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
    optimizer = sgd(model)
    with pytest.warns(instrument.InstrumentWarning, match=r"never called .* 0\.self_attn\.out_proj"):
        for step in range(3):
            optimizer.zero_grad()
            model(batch(step).view(2, 8, 4)).mean().backward()
            optimizer.step()
    assert len(watcher.notices) == 1
    assert "Gradients/0.self_attn.out_proj.weight" in watcher.history[-1]
    watcher.close()


class TestWriters:
    """Where records go."""

    def test_a_new_run_directory_is_made_without_a_logdir(self, tmp_path: Path) -> None:
        """Without writer and logdir the run lies in `runs/{date}_001/logs/tensorboard`, the next in `_002`."""
        first = instrument.watch(mlp(), interval=1)
        second = instrument.watch(mlp(), interval=1)
        assert first.logdir is not None
        assert second.logdir is not None
        assert Path(first.logdir).parts[-3].endswith("_001")
        assert Path(second.logdir).parts[-3].endswith("_002")
        assert Path(first.logdir).parts[0] == "runs"
        assert Path(first.logdir).parts[-2:] == ("logs", "tensorboard")
        assert resolve_run(Path(first.logdir).parents[1]) == Path(first.logdir)

    def test_our_writer_is_a_summary_writer_for_the_users_own_loss(self, tmp_path: Path) -> None:
        """Losses logged to `watcher.writer` stand in the same run as what the watch wrote."""
        model = mlp()
        watcher = instrument.watch(model, interval=2, logdir=tmp_path, strict=True)
        assert isinstance(watcher.writer, TorchSummaryWriter)
        assert watcher.logdir == str(tmp_path)
        for step, loss in enumerate(train(model, sgd(model), 4)):
            watcher.writer.add_scalar("loss", loss, step)
        watcher.writer.add_text("note", "hello", 0)
        watcher.close()
        _, scalars = read_back(tmp_path)
        assert list(scalars["loss"]) == [0, 1, 2, 3]
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("make", [TorchSummaryWriter, instrument.SummaryWriter])
    def test_a_users_writer_is_written_through_and_never_closed(
        self, make: Callable[[str], TorchSummaryWriter], tmp_path: Path
    ) -> None:
        """A writer that is given gets the same tags and stays open; our own class counts as given too."""
        writer = make(str(tmp_path))
        model = mlp()
        watcher = instrument.watch(model, interval=2, scalar_interval=1, writer=writer, strict=True)
        train(model, sgd(model), 3)
        watcher.close()
        writer.add_scalar("after", 1.0, 0)
        writer.close()
        histograms, scalars = read_back(tmp_path)
        assert histograms["Gradients/0.weight"] == [0, 2]
        assert list(scalars["Gradients.rms/0.weight"]) == [0, 1, 2]
        assert scalars["after"] == {0: 1.0}
        assert len(list(tmp_path.iterdir())) == 1

    def test_any_object_with_the_methods_will_do(self) -> None:
        """A writer of another make, with `add_scalar` and `add_histogram_raw` alone, is written through."""

        class Recorder:
            def __init__(self) -> None:
                self.scalars: list[tuple[str, float, int]] = []
                self.histograms: list[tuple[str, float, float]] = []

            def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
                self.scalars.append((tag, scalar_value, global_step))

            def add_histogram_raw(
                self, tag: str, *, num: float, bucket_limits: list[float], bucket_counts: list[float],
                global_step: int, **_: object,
            ) -> None:  # fmt: skip
                assert len(bucket_limits) == len(bucket_counts)
                self.histograms.append((tag, num, global_step))

        writer = Recorder()
        model = mlp()
        watcher = instrument.watch(model, ["0.weight"], interval=1, writer=writer, strict=True)
        train(model, sgd(model), 2)
        watcher.flush()
        assert watcher.writer is writer
        assert writer.histograms.count(("Parameters/0.weight", 32, 0)) == 1
        assert {tag for tag, _, _ in writer.scalars} >= {"Gradients.rms/0.weight", "Parameters.rms/0.weight"}
        watcher.close()

    def test_a_users_writer_that_fails_is_told_once(self) -> None:
        """A writer that raises is told once, and training goes on."""

        class Broken:
            def add_scalar(self, *_: object) -> None:
                raise OSError("no space left on device")

            add_histogram_raw = add_scalar

        model = mlp()
        watcher = instrument.watch(model, interval=1, writer=Broken())
        with pytest.warns(instrument.InstrumentWarning, match="the writer given raised OSError: no space") as caught:
            train(model, sgd(model), 3)
            watcher.close()
        assert len(caught) == 1

    def test_flush_brings_what_was_buffered_to_disk(self, tmp_path: Path) -> None:
        """After `flush` the file holds the last finished step, while the watch goes on."""
        model = mlp()
        watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
        for step in range(3):
            train(model, sgd(model), 1, first=step)
            watcher.flush()
            assert read_back(tmp_path)[0]["Parameters/0.weight"] == list(range(step + 1))
        watcher.close()


class TestLife:
    """A watch from beginning to end."""

    def test_watching_again_closes_the_earlier_watch_with_a_warning(self, tmp_path: Path) -> None:
        """A second watch closes the first, with a warning; a refused one leaves it alive."""
        model = mlp()
        first = instrument.watch(model, interval=1, logdir=tmp_path / "1")
        with pytest.raises(instrument.SelectionError):
            instrument.watch(model, include="nothing_like_it")
        with pytest.raises(instrument.ConfigError):
            instrument.watch(model, writer=object())
        optimizer = sgd(model)
        train(model, optimizer, 1)
        assert len(first.history) == 1
        with pytest.warns(instrument.InstrumentWarning, match="watched already; the earlier watch is closed"):
            second = instrument.watch(model, interval=1, logdir=tmp_path / "2")
        train(model, optimizer, 2, first=1)
        assert len(first.history) == 1
        assert len(second.history) == 2
        second.close()

    def test_unwatch_closes_and_may_be_called_where_there_is_none(self, tmp_path: Path) -> None:
        """`unwatch` closes the watch; without one nothing happens, and closing twice does no harm."""
        model = mlp()
        instrument.unwatch(model)
        watcher = instrument.watch(model, interval=1, logdir=tmp_path)
        instrument.unwatch(model)
        instrument.unwatch(model)
        watcher.close()
        assert "closed" in repr(watcher)

    def test_as_a_context_manager_it_closes_also_after_an_exception(self, tmp_path: Path) -> None:
        """Leaving the block by an exception closes the watch and lets the exception pass."""
        model = mlp()
        with pytest.raises(KeyError), instrument.watch(model, interval=1, logdir=tmp_path) as watcher:
            train(model, sgd(model), 2)
            raise KeyError
        assert "closed" in repr(watcher)
        assert read_back(tmp_path)[0]["Parameters/0.weight"] == [0, 1]

    def test_a_model_that_goes_is_freed_at_once_and_its_last_step_logged(self, tmp_path: Path) -> None:
        """A model that was a local variable is freed without the collector, and its last step is on disk."""

        def run() -> weakref.ref[nn.Module]:
            model = mlp()
            instrument.watch(model, interval=4, scalar_interval=4, logdir=tmp_path, strict=True)
            train(model, sgd(model), 7)
            return weakref.ref(model)

        gc.disable()
        try:
            assert run()() is None
        finally:
            gc.enable()
        histograms, _ = read_back(tmp_path)
        assert histograms["Parameters/0.weight"] == [0, 4, 6]
        assert histograms["Gradients/0.weight"] == [0, 4, 6]

    def test_a_parameter_that_leads_back_to_its_model_keeps_no_model_alive(self, tmp_path: Path) -> None:
        """A hook of the user's that holds the model makes a cycle; the collector can still free it."""

        def run() -> weakref.ref[nn.Module]:
            model = mlp()

            def hook(gradient: torch.Tensor) -> None:
                assert model is not None

            weight: Any = model[0].weight
            weight.register_hook(hook)
            instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
            train(model, sgd(model), 2)
            return weakref.ref(model)

        reference = run()
        gc.collect()
        assert reference() is None

    def test_the_last_step_is_logged_once(self, tmp_path: Path) -> None:
        """Where the last step was sampled for scalars only, closing adds its histograms and nothing twice."""
        model = mlp()
        watcher = instrument.watch(model, interval=4, scalar_interval=1, logdir=tmp_path, strict=True)
        train(model, sgd(model), 7)
        watcher.close()
        histograms, scalars = read_back(tmp_path)
        assert histograms["Activations/0"] == [0, 4, 6]
        assert list(scalars["Activations.rms/0"]) == list(range(7))

    def test_initial_step_goes_on_where_a_run_left(self, tmp_path: Path) -> None:
        """A resumed run counts from `initial_step`, and its points stand behind the earlier ones."""
        model = mlp()
        optimizer = sgd(model)
        with instrument.watch(model, interval=5, logdir=tmp_path, strict=True):
            train(model, optimizer, 10)
        with instrument.watch(model, interval=5, initial_step=10, logdir=tmp_path, strict=True) as watcher:
            assert watcher.current_step == 10
            train(model, optimizer, 6, first=10)
            assert watcher.current_step == 16
        assert read_back(tmp_path)[0]["Parameters/0.weight"] == [0, 5, 9, 10, 15]

    def test_a_report_shows_the_last_values(self, tmp_path: Path) -> None:
        """`report()` has a row for each site and one for each layer, with the values of the last record."""
        model = mlp()
        watcher = instrument.watch(model, interval=1, logdir=tmp_path, strict=True)
        assert str(watcher.report()) == "nothing has been recorded yet"
        train(model, sgd(model), 3)
        rows = {(row.kind, row.name): row for row in watcher.report().rows}
        assert set(rows) == set(watcher.sites)
        record = watcher.history[-1]
        assert rows["gradients", "0.weight"].values["rms"] == record["Gradients/0.weight"].rms
        assert rows["gradients", "0.weight"].step == 2
        health = {row.layer: row for row in watcher.report().health}
        assert list(health) == ["0", "1", "2", "3"]
        assert health["0"].gradient_rms == record["Gradients/0.weight"].rms
        assert health["1"].activation_rms == record["Activations/1"].rms
        assert "nothing looks wrong" in str(watcher.report())
        assert "<pre>" in watcher.report()._repr_html_()
        watcher.close()


def test_a_module_replaced_after_a_forward_is_seen_in_the_step(tmp_path: Path) -> None:
    """Replaced behind a dry run, or between forward and step, a module's parameters are those of the model as it is."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with instrument.watch(model, logdir=tmp_path, interval=1) as watcher:
        torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(3, 4)).sum()
        model[2] = nn.Linear(8, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(3, 4)).sum().backward()
        model.append(nn.Linear(5, 1))
        optimizer.step()
        watcher.flush()
        record = watcher.history[0]
    assert record["Parameters/2.weight"].count == 40
    assert record["Gradients/2.weight"].count == 40
    assert record["Parameters/3.weight"].count == 5


class Made(nn.Module):
    """A layer whose weight is made when it is first called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (n, 8) for any x of shape (n, inputs)."""
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.ones(x.shape[-1], 8))
        return x @ self.weight


class Scaled(nn.Linear):
    """A layer whose weight is a number."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape of x."""
        return x * self.weight + self.bias


def test_a_parameter_made_in_a_dry_run_is_there_on_the_first_step(tmp_path: Path) -> None:
    """What the first call makes is measured on the first step, with its gradient."""
    model = nn.Sequential(Made(), nn.Linear(8, 2))
    with instrument.watch(model, logdir=tmp_path, interval=1) as watcher:
        model(torch.ones(3, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        watcher.flush()
        record = watcher.history[0]
    assert (record["Parameters/0.weight"].count, record["Gradients/0.weight"].count) == (32, 32)


def test_a_weight_that_is_a_number_costs_no_other_its_gradient(tmp_path: Path) -> None:
    """Of a weight without rows no rows are tallied, and all gradients are there."""
    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 1))
    with instrument.watch(model, logdir=tmp_path, interval=1, strict=True) as watcher:
        train(model, sgd(model), 3)
        watcher.flush()
        names = {tag.partition("/")[2] for tag in watcher.history[-1] if tag.startswith("Gradients/")}
        assert names == {name for name, _ in model.named_parameters()}
        assert not watcher.notices


def test_a_hook_put_on_a_parameter_after_the_forward_keeps_no_model_alive(tmp_path: Path) -> None:
    """Parameters whose hooks lead back to their model are let go with it, whenever the hooks came."""
    model = mlp()
    optimizer = sgd(model)
    watcher = instrument.watch(model, logdir=tmp_path, interval=100)
    loss = model(torch.ones(3, 4)).sum()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient, model=model: None)
    loss.backward()
    optimizer.step()
    alive = weakref.ref(model)
    del model, optimizer, loss, parameter
    gc.collect()
    assert alive() is None
    watcher.close()


@pytest.mark.parametrize("has_attributes", [False, True])
def test_the_last_step_of_a_model_that_is_gone_has_the_roots_own_parameters(
    has_attributes: bool, tmp_path: Path
) -> None:
    """Plain attributes on parameters, as trainers put them there, lead nowhere and cost no parameter its last step."""

    class Root(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.part(super().forward(x))
            return out

    def training() -> torch.optim.Optimizer:
        model = Root()
        if has_attributes:
            for parameter in model.parameters():
                cast(Any, parameter).is_tagged = True
        optimizer = sgd(model)
        instrument.watch(model, kinds=["parameters"], interval=10, scalar_interval=10, logdir=tmp_path)
        for step in range(3):
            optimizer.zero_grad()
            model(batch(step)).mean().backward()
            optimizer.step()
        return optimizer

    optimizer = training()
    gc.collect()
    assert optimizer.param_groups
    histograms, _ = read_back(tmp_path)
    assert {tag for tag, steps in histograms.items() if 2 in steps} == {
        f"Parameters/{name}" for name in ("weight", "bias", "part.weight", "part.bias")
    }
