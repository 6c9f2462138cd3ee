"""Lightning, with automatic and manual optimization, beside loops that are written by hand."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import instrument
from instrument.integrations.lightning import WatchCallback

from ..training import read_back
from .twins import Trained, activations, assert_gradients, assert_same_bits, event_files, gradient_norms, trained

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCH, BATCHES, CLIP = 4, 6, 0.05


def data() -> torch.utils.data.DataLoader[Any]:
    x = torch.randn(BATCH * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=BATCH)


def net(outputs: int = 1, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, outputs))


class Automatic(pl.LightningModule):  # type: ignore[misc]  # the trainers have no annotations here
    """Calls itself, or only its part, in a step."""

    def __init__(self, calls_itself: bool = True) -> None:
        super().__init__()
        self.net = net()
        self.calls_itself = calls_itself
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = (self if self.calls_itself else self.net)(batch[0]).square().mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("held_out", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Adversaries(pl.LightningModule):  # type: ignore[misc]
    """Two networks and two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = net(4, dropout=0.1), net(dropout=0.1)
        self.losses: list[float] = []
        self.norms: list[dict[str, float]] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        of_generator, of_critic = self.optimizers()
        norms: dict[str, float] = {}
        fake = self.generator(batch[0])
        for optimizer, part in ((of_critic, "critic"), (of_generator, "generator")):
            if part == "critic":
                loss = self.critic(fake.detach()).mean() - self.critic(batch[0]).mean()
            else:
                loss = -self.critic(fake).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            norms |= {name: norm for name, norm in gradient_norms(self).items() if name.startswith(part)}
            optimizer.step()
            self.losses.append(loss.item())
            self.log(part, loss)
        self.norms.append(norms)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def trainer(directory: Path, *callbacks: Any, **arguments: Any) -> Any:
    chosen = {
        "accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "log_every_n_steps": 1, "logger": False, "default_root_dir": directory,
    } | arguments  # fmt: skip
    return pl.Trainer(**{"callbacks": list(callbacks), **chosen})


def fit(
    make: Callable[[], Any], directory: Path, watch: Callable[[nn.Module], Any] | None = None, **arguments: Any
) -> tuple[Trained, Any, Any]:
    torch.manual_seed(0)
    model = make()
    watcher = watch(model) if watch else None
    run = trainer(directory, **arguments)
    run.fit(model, data(), data() if isinstance(model, Automatic) else None)
    return trained(model, model.losses, getattr(model, "norms", [])), watcher, run


def by_hand(accumulate: int) -> list[dict[str, float]]:
    """Norms of the gradients of each step of `Automatic`, from a loop without any trainer."""
    torch.manual_seed(0)
    model, norms = Automatic(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for index, (x,) in enumerate(data()):
            (model.net(x).square().mean() / accumulate).backward()
            if (index + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                norms.append(gradient_norms(model))
                optimizer.step()
                optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_line_before_automatic_optimization(accumulate: int, tmp_path: Path) -> None:
    """Validation, clipping and accumulation: same bits, and the gradients of a loop without any trainer."""
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": CLIP}
    plain, _, _ = fit(Automatic, tmp_path, **settings)
    watched, watcher, run = fit(
        Automatic, tmp_path, lambda model: instrument.watch(model, include="net.*", interval=1, strict=True), **settings
    )
    assert_same_bits(watched, plain)
    assert watcher.current_step == run.global_step == 2 * BATCHES // accumulate
    assert_gradients(watcher.history, plain._replace(norms=by_hand(accumulate)), "net.*")
    counts = {"net.0": 8, "net.1": 8, "net.2": 8, "net.3": 1}
    expected = {name: accumulate * BATCH * width for name, width in counts.items()}
    assert [activations(record) for record in watcher.history] == [expected] * run.global_step
    assert watcher.notices == ()


def test_one_line_before_manual_optimization(tmp_path: Path) -> None:
    """Two optimizers, each with the gradients of its own step; a batch is one step, though Lightning counts two."""
    plain, _, _ = fit(Adversaries, tmp_path)
    watched, watcher, run = fit(
        Adversaries, tmp_path, lambda model: instrument.watch(model, include="**.0", interval=1, strict=True)
    )
    assert_same_bits(watched, plain)
    assert watcher.current_step == 2 * BATCHES == run.global_step // 2
    assert_gradients(watcher.history, plain, "**.0")
    # The module itself is never called, so that its parts are followed from the second step on.
    assert all(set(activations(record)) == {"generator.0", "critic.0"} for record in list(watcher.history)[1:])


@pytest.mark.parametrize("calls_itself", [True, False])
def test_the_callback_writes_to_the_trainers_tensorboard(calls_itself: bool, tmp_path: Path) -> None:
    """Losses and tags of ours stand in the same file at the same steps, the first included."""
    plain, _, _ = fit(lambda: Automatic(calls_itself), tmp_path, logger=TensorBoardLogger(tmp_path / "plain"))
    callback = WatchCallback(include="net.*", interval=3, scalar_interval=1, strict=True)
    watched, _, run = fit(
        lambda: Automatic(calls_itself),
        tmp_path,
        logger=TensorBoardLogger(tmp_path / "ours"),
        callbacks=[callback],
    )
    assert_same_bits(watched, plain)
    (file,) = event_files(tmp_path / "ours")
    histograms, scalars = read_back(file.parent)
    steps = list(range(run.global_step))
    assert list(scalars["loss"]) == list(scalars["Activations.rms/net.3"]) == steps
    assert list(scalars["Gradients.rms/net.3.weight"]) == steps
    assert histograms["Activations/net.3"] == [*steps[::3], steps[-1]]
    assert callback.watcher is not None
    assert callback.watcher.current_step == run.global_step
    assert not (Path.cwd() / "runs").exists()


def test_the_callback_with_two_optimizers_keeps_to_the_axis_of_the_losses(tmp_path: Path) -> None:
    """Under manual optimization our points stand where `self.log` draws."""
    torch.manual_seed(0)
    model, callback = Adversaries(), WatchCallback(include="**.0", interval=1, strict=True)
    trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path / "ours")).fit(model, data())
    (file,) = event_files(tmp_path / "ours")
    _, scalars = read_back(file.parent)
    assert list(scalars["critic"]) == list(range(2 * BATCHES))
    assert list(scalars["Gradients.rms/critic.0.weight"]) == list(range(2 * BATCHES))
    assert list(scalars["Activations.rms/generator.0"]) == list(range(2 * BATCHES))
    assert callback.watcher is not None
    assert_gradients(callback.watcher.history, trained(model, model.losses, model.norms), "**.0")


def test_the_callback_refuses_at_once_and_closes_when_training_fails(tmp_path: Path) -> None:
    """Wrong keywords are refused when it is made; after an exception of the user's the run is whole and closed."""
    with pytest.raises(instrument.ConfigError, match="unknown keyword 'includes'; did you mean 'include'"):
        WatchCallback(includes="net")
    with pytest.raises(instrument.SelectionError, match="matches no name"):
        trainer(tmp_path, WatchCallback(include="nothing")).fit(Automatic(), data())

    class Failing(Automatic):
        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            if index == 3:
                raise RuntimeError("the user's")
            return super().training_step(batch, index)

    callback = WatchCallback(include="net.*", interval=2)
    with pytest.raises(RuntimeError, match="the user's"):
        trainer(tmp_path, callback).fit(Failing(), data())
    assert callback.watcher is not None
    assert repr(callback.watcher).startswith("Watcher(closed")
    assert callback.watcher.logdir is not None
    assert read_back(callback.watcher.logdir)[0]["Parameters/net.0.weight"] == [0, 2]


def test_the_callback_serves_the_package_under_its_other_name(tmp_path: Path) -> None:
    """With ``pytorch_lightning`` alone in use, the callback is one of its own and nothing else is imported."""
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, pytorch_lightning as pl
from instrument.integrations.lightning import WatchCallback

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = WatchCallback(interval=1)
assert isinstance(callback, pl.Callback) and "lightning.pytorch" not in sys.modules
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], enable_progress_bar=False)
trainer.fit(Lit(), torch.utils.data.DataLoader(torch.randn(12, 4), batch_size=4))
print([record.step for record in callback.watcher.history], callback.watcher.logdir == trainer.logger.log_dir)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1:] == ["[0, 1, 2] True"], result.stderr
